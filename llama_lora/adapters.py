"""LoRA matrices by the name of the layer they belong to, and their PEFT directory.

adapter_config.json and adapter_model.safetensors are PEFT's, so that `PeftModel.from_pretrained(base, DIR)`
takes them; tokenizer files lie beside them. What the adapter was trained over, which PEFT does not keep, is
noted in the metadata of the weights: the method, and some weights of the base, by which another one is known.
A directory is written beside its place and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt import extras
from gpt.cli import UserError
from llama_lora.base import check, sample
from llama_lora.config import PROJECTIONS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in the file
METHOD, BASE = "tapelm.method", "tapelm.base"  # in the metadata of the file


@dataclass(frozen=True)
class Recipe:
    """What is made of a base model before it is trained."""

    method: str = "qlora"
    rank: int = 16
    alpha: float = 16.0
    target_modules: tuple[str, ...] = PROJECTIONS

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class Adapter:
    """The matrices of one linear layer (N, K): lora_a (R, K), lora_b (N, R), and its frozen weight."""

    lora_a: Tensor
    lora_b: Tensor
    dense_weight: Callable[[], Tensor]
    """(N, K), dequantized."""


def reset(adapters: Mapping[str, Adapter], seed: int) -> None:
    """lora_a uniform in +-1/sqrt(K) from `seed` alone, lora_b zero: the model starts as its base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters.values():
            values = torch.rand(adapter.lora_a.shape, generator=generator) * 2.0 - 1.0
            adapter.lora_a.copy_(values / adapter.lora_a.shape[1] ** 0.5)
            adapter.lora_b.zero_()


def named_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """The matrices in float32 under PEFT's names; no copies where they are in float32, on the CPU."""
    tensors = {}
    for name, adapter in adapters.items():
        for part, tensor in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
            # float32 holds either dtype exactly and is what PEFT keeps adapters in.
            tensors[f"{PREFIX}{name}.{part}.weight"] = tensor.detach().float().cpu().contiguous()
    return tensors


def write(out: Path, adapters: Mapping[str, Adapter], recipe: Recipe, base: Path) -> None:
    """The PEFT directory `out`, without tokenizer; OSError when the disk is full."""
    described = extras.peft().LoraConfig(
        r=recipe.rank,
        lora_alpha=int(recipe.alpha) if float(recipe.alpha).is_integer() else recipe.alpha,
        target_modules=list(recipe.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    described.save_pretrained(out)
    noted = {METHOD: recipe.method, BASE: sample(base)}
    try:
        save_file(named_tensors(adapters), out / WEIGHTS, metadata={"format": "pt", **noted})
    except SafetensorError as error:  # it reports a full disk under its own type
        raise OSError(str(error)) from error
    (out / WEIGHTS).chmod(0o644)  # safetensors leaves 0600


def read_recipe(path: Path) -> tuple[Recipe, Path]:
    """Recipe and base model of a PEFT directory; the method is "lora", as PEFT keeps none."""
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"no {CONFIG} in {path}: name the adapter directory of a run, RUN/adapter")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        targets, rank, alpha = tuple(found["target_modules"]), found["r"], found["lora_alpha"]
        base = Path(found["base_model_name_or_path"])
        if not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise TypeError(f"r is {rank!r}, lora_alpha {alpha!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a LoRA configuration: {error!r}") from error
    used = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if found.get(name)]
    if used or set(targets) - set(PROJECTIONS):
        raise UserError(f"{file} asks for {', '.join(used or targets)}, which is not supported")
    return Recipe("lora", rank, alpha, tuple(sorted(targets, key=PROJECTIONS.index))), base


def method_of(path: Path | None, asked: str) -> str:
    """`asked`; for "auto" what the adapter in `path` was trained over, "lora" where there is no adapter.

    Raises UserError for an adapter that does not say, such as one of another program.
    """
    if asked != "auto" or path is None:
        return "lora" if asked == "auto" else asked
    noted = _notes(path).get(METHOD)
    if noted not in ("lora", "qlora"):
        raise UserError(
            f"{path / WEIGHTS} does not say what the adapter was trained over: pass --method qlora (the base "
            "in NF4) or --method lora (the base as it is)"
        )
    return noted


def base_of(path: Path, given: Path | None) -> Path:
    """The base model for the adapter in `path`: `given`, else the one that it names.

    Raises UserError for one with other weights than those it was trained over.
    """
    _, named = read_recipe(path)
    base = given or named
    check(_notes(path).get(BASE), named, base, path)
    return base


def _notes(path: Path) -> dict[str, str]:
    file = path / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def load(path: Path, adapters: Mapping[str, Adapter]) -> None:
    """Copy the matrices of a PEFT directory into a model's adapters. Raises UserError unless all fit."""
    file = path / WEIGHTS
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    wanted = named_tensors(adapters)
    if (missing := wanted.keys() - found.keys()) or (unknown := found.keys() - wanted.keys()):
        name = min(missing or unknown)
        raise UserError(f"{file} {'lacks' if missing else 'has no place for'} {name}: it is of another model")
    with torch.no_grad():
        for name, adapter in adapters.items():
            for part, tensor in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
                loaded = found[f"{PREFIX}{name}.{part}.weight"]
                if loaded.shape != tensor.shape:
                    raise UserError(
                        f"{file}: {part} of {name} is {tuple(loaded.shape)}, not {tuple(tensor.shape)}"
                    )
                tensor.copy_(loaded)

"""The ladder of the GPT, from the plain model in float32 to all of tapelm.

Our bf16 kernels need bf16 weights, so that our AdamW, which keeps their float32 masters, stands before them.
The batches are real text in the same order on every rung, sequential windows of token shards: from PyTorch's
DataLoader until the rung where our loader takes over.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from benchmarks.gpu_check import own_text
from benchmarks.kept_memory import is_kept
from benchmarks.ladder import Ladder, Request, Rung
from benchmarks.loader import Windows
from benchmarks.train import VOCAB_SIZE, Batches, Step, settings
from gpt.cli import UserError
from gpt.corpus import END_OF_TEXT, SHARD_HEADER_BYTES
from gpt.hardware import pick_precision
from gpt.ops import PLAIN, Ops, ParameterGroups, load_ops
from tapelm import Tokenizer, TokenLoader
from tapelm._shard_writer import token_dtype
from tapelm.shards import read_manifest

KERNELS = {
    "attention": ("attention",),
    "norms": ("add_norm", "layer_norm", "embedding"),
    "bias_gelu": ("mlp",),
    "linear cross-entropy": ("cross_entropy",),
    "linear": ("linear", "mlp"),
}
"""Rungs of kernels, in order, and the entries of the table of ops that each takes from tapelm."""


@dataclass(frozen=True)
class Setting:
    """Which optimizations a step has; `kernels` are keys of KERNELS."""

    precision: str
    attention: str = "plain"
    """Where our kernel is off: "plain" or "sdpa"."""
    kernels: frozenset[str] = frozenset()
    adamw: str = "torch"
    """"torch", "torch fused", "torch masters" or "tapelm"."""
    loader: bool = False
    compiled: bool = False
    checkpointing: bool = False


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """`Ops.attention` of training, where there are as many keys as queries."""
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


def ops_of(setting: Setting) -> Ops:
    """The plain table with the entries of the optimized one that the setting has."""
    ops = replace(PLAIN, name="ladder", attention=sdpa if setting.attention == "sdpa" else PLAIN.attention)
    needs_ours = setting.kernels or setting.adamw == "tapelm"
    ours = load_ops("optimized") if needs_ours else PLAIN
    for kernel in setting.kernels:
        ops = replace(ops, **{name: getattr(ours, name) for name in KERNELS[kernel]})
    if "bias_gelu" in setting.kernels and "linear" not in setting.kernels:
        import tapelm

        ops = replace(
            ops,
            mlp=lambda x, up, up_bias, down, down_bias: F.linear(
                tapelm.bias_gelu(F.linear(x, up), up_bias), down, down_bias
            ),
        )
    elif "linear" in setting.kernels and "bias_gelu" not in setting.kernels:
        linear = ours.linear
        ops = replace(
            ops,
            mlp=lambda x, up, up_bias, down, down_bias: linear(
                F.gelu(linear(x, up, up_bias), approximate="tanh"), down, down_bias
            ),
        )
    if setting.adamw == "tapelm":
        return replace(ops, adamw=ours.adamw)
    return replace(ops, adamw=MasterAdamW) if setting.adamw == "torch masters" else ops


class MasterAdamW(torch.optim.Optimizer):
    """bf16 parameters trained by PyTorch's fused AdamW: on float32 masters, copied back after each step."""

    def __init__(self, groups: ParameterGroups, **options: Any) -> None:
        super().__init__(groups, {})
        self.masters = [
            {**group, "params": [p.detach().float().requires_grad_() for p in group["params"]]}
            for group in groups
        ]
        self.inner = PLAIN.adamw(self.masters, fused=True, **options)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            yield from zip(group["params"], masters["params"], strict=True)

    @torch.no_grad()
    def set_master(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        for own, kept in self.pairs():
            if own is parameter:
                kept.copy_(master)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter, master in self.pairs():
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.inner.step()
        for parameter, master in self.pairs():
            parameter.copy_(master)
            master.grad = None


@dataclass(frozen=True)
class Place:
    """Where the steps of one ladder run: picklable, as a process for peak memory makes its own."""

    preset: str
    batch_size: int
    device: str
    shards: Path

    def step(self, setting: Setting) -> Step:
        device = torch.device(self.device)
        config = settings(self.preset, self.batch_size)
        batches = (ours if setting.loader else theirs)(
            self.shards, self.batch_size, config.block_size, device
        )
        options: dict[str, Any] = {"fused": True} if setting.adamw == "torch fused" else {}
        return Step(
            self.preset, "optimized", self.batch_size, device, precision=setting.precision,
            compiled=setting.compiled, checkpointing=setting.checkpointing, ops=ops_of(setting),
            batches=batches, **options,
        )  # fmt: skip


def ours(shards: Path, batch_size: int, block_size: int, device: torch.device) -> Batches:
    loader = TokenLoader(shards, batch_size, block_size, order="sequential", device=device)
    for batch in loader:
        yield batch.inputs, batch.targets


def theirs(shards: Path, batch_size: int, block_size: int, device: torch.device) -> Batches:
    manifest, _ = read_manifest(shards)
    first = manifest["shards"][0]
    dtype = token_dtype(manifest["vocab_size"])
    tokens = np.memmap(shards / first["file"], dtype, "r", SHARD_HEADER_BYTES, (first["tokens"],))
    loader = DataLoader(Windows(tokens, block_size), batch_size, drop_last=True)
    for _ in itertools.count():
        for inputs, targets in loader:
            yield inputs.to(device), targets.to(device)


def prepare(folder: Path, vocab_size: int) -> Path:
    """Token shards of this repository's own text, made with a tokenizer of at most `vocab_size` ids."""
    texts = own_text()
    tokenizer = Tokenizer.train(texts, vocab_size)
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert END_OF_TEXT in tokenizer.special_tokens
    tokenizer.encode_files([source], folder / "shards")
    return folder / "shards"


def build(request: Request, folder: Path) -> Ladder:
    """The rungs that this machine can have; `folder` takes the shards where the request names no data."""
    preset, batch_size, device = request.preset, request.batch_size, request.device
    config = settings(preset, batch_size, kernels="optimized")
    place = Place(preset, batch_size, str(device), shards_of(request.data, preset, folder))
    half = pick_precision(config, device) == "bf16"
    rungs, skipped = [], []

    def add(name: str, setting: Setting, kind: Any = "step", *, elsewhere: bool = False) -> None:
        rungs.append(Rung(name, partial(place.step, setting), kind, elsewhere))

    now = Setting("fp32")
    kept = device.type == "cpu" and is_kept()
    add("plain fp32", now, elsewhere=kept)
    if kept:
        add("+ kept memory", now)
    if half:
        now = replace(now, precision="bf16-autocast", adamw="torch fused")
        add("+ bf16 autocast, fused AdamW", now)
    else:
        now = replace(now, adamw="torch fused")
        add("+ fused AdamW", now)
        skipped.append("bf16 autocast and bf16 weights: this CPU does not multiply bfloat16")
    now = replace(now, attention="sdpa")
    add("+ SDPA", now)
    if request.compiled:
        add("+ torch.compile", replace(now, compiled=True), "branch")
    else:
        skipped.append("torch.compile: left out by --no-compiled")
    now = replace(now, adamw="tapelm", precision="bf16" if half else "fp32")
    add("+ our AdamW, bf16 weights" if half else "+ our AdamW", now)
    for kernel in KERNELS:
        now = replace(now, kernels=now.kernels | {kernel})
        add(f"+ {kernel}", now)
    now = replace(now, loader=True)
    add("+ loader", now)
    add("+ activation checkpointing", replace(now, checkpointing=True), "memory")
    return Ladder(f"gpt {preset}", rungs, removals(place, now), 1e-2 if half else 1e-4, skipped)


def removals(place: Place, full: Setting) -> list[Rung]:
    """The full set without one of its parts: what PyTorch has takes its place."""
    without = {kernel: replace(full, kernels=full.kernels - {kernel}) for kernel in KERNELS}
    without["AdamW"] = replace(full, adamw="torch masters" if full.precision == "bf16" else "torch fused")
    without["loader"] = replace(full, loader=False)
    if full.precision == "bf16":
        without["bf16"] = replace(full, precision="fp32")
    return [Rung(f"without {name}", partial(place.step, setting)) for name, setting in without.items()]


def shards_of(data: Path | None, preset: str, folder: Path) -> Path:
    """The training shards of a prepared data directory, or of this repository's text, made in `folder`.

    Raises UserError when their ids do not fit the model of `preset`.
    """
    size = settings(preset, 1).vocab_size or VOCAB_SIZE
    if data is None:
        return prepare(folder, size)
    try:
        found = read_manifest(data / "train")[0]["vocab_size"]
    except (OSError, ValueError) as error:
        raise UserError(
            f"no token shards in {data / 'train'}: run python -m data.prepare ({error})"
        ) from error
    if found > size:
        raise UserError(f"{data} has {found} token ids, the {preset} preset {size}: choose another --data")
    return data / "train"

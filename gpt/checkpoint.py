"""Checkpoints that are whole or absent.

    RUN/checkpoints/step-00000100/
        model.safetensors       parameters under their names in the model
        optimizer.safetensors   <parameter>/<state>, e.g. head.weight/exp_avg
        state.json              step, configuration, loader position, generators of every rank
        tokenizer.json          copied from the data, so that the directory can generate text by itself
        manifest.json           SHA-256 of the four files above

Everything is written to a temporary directory, flushed to the disk and renamed. A flipped bit in
safetensors loads silently, so nothing is read before its hash is checked.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.cli import UserError, flush
from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.ops import load_ops
from gpt.parallel import as_cut, whole

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")


class Saved(Protocol):
    """What a checkpoint holds of a model: all of a GPT, or the part of a larger one that trains."""

    @property
    def config(self) -> Any:
        """An object whose fields, all JSON, describe the shape."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> Any: ...

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class Tensors(NamedTuple):
    """What a checkpoint keeps of a model by the names of its parameters, and of its optimizer."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def tensors_of(model: Saved, optimizer: torch.optim.Optimizer, keep: bool = True) -> Tensors:
    """Without copies. What is cut among ranks is put together, which all of them do and one may keep."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for tensors, kept in zip((model.state_dict(), _optimizer_tensors(model, optimizer)), found, strict=True):
        for name, tensor in tensors.items():
            together = whole(tensor)
            if keep:
                kept[name] = together
    return Tensors(*found)


def save(root: Path, tensors: Tensors, state: dict[str, Any], *, tokenizer: Path, keep: int) -> Path:
    """Write root/step-<state["step"]>; then `keep` checkpoints stay, this one and those just before it.

    Later ones, which a run that went back to an earlier checkpoint has abandoned, are removed. `state` must
    be JSON and needs "step" and "model", the shape. Raises OSError when the disk is full.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    final = root / f"step-{state['step']:08d}"
    temporary = root / f".{final.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        _save_tensors(tensors.model, temporary / "model.safetensors")
        _save_tensors(tensors.optimizer, temporary / "optimizer.safetensors")
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
        (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {"sha256": {name: sha256_of(temporary / name) for name in FILES}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if final.exists():  # a corrupt one that an earlier resume stepped over
            os.replace(final, temporary.with_suffix(".old"))
        os.replace(temporary, final)
        flush(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_leftovers(root)
    before = [path for path in _steps(root) if path.name <= final.name]
    for path in set(_steps(root)) - set(before[-keep:]):
        shutil.rmtree(path)
    return final


def restore(path: Path, model: Saved, optimizer: torch.optim.Optimizer, rank: int = 0) -> dict[str, Any]:
    """Load parameters, optimizer state and the rank's generators from a verified checkpoint.

    Returns its state.json.
    """
    state = read_state(path)
    parameters = dict(model.named_parameters())
    tensors = load_file(path / "model.safetensors")
    model.load_state_dict({name: as_cut(tensor, parameters.get(name)) for name, tensor in tensors.items()})
    names = _optimizer_names(model, optimizer)
    indices = {name: index for index, name in enumerate(names)}
    loaded: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(path / "optimizer.safetensors").items():
        name, entry = key.rsplit("/", 1)
        loaded.setdefault(indices[name], {})[entry] = as_cut(tensor, parameters[name])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
    generators = state["generators"]
    device = next(iter(parameters.values())).device
    _set_generators(generators[rank] if isinstance(generators, list) else generators, device)
    return state


def load_model(path: Path, *, kernels: str = "auto", device: str = "cpu") -> tuple[GPT, Path, dict[str, Any]]:
    """The model of a checkpoint or run directory for inference, its checkpoint directory and its state.json.

    Parameters keep the dtype they were trained in. `kernels` "auto" takes the table of ops of the run.
    """
    checkpoint = find(path)
    if checkpoint is None:
        raise UserError(f"no checkpoint in {path}: expected manifest.json or checkpoints/step-*")
    verify(checkpoint)
    state = read_state(checkpoint)
    ops = load_ops(state["config"]["kernels"] if kernels == "auto" else kernels)  # type: ignore[arg-type]
    tensors = load_file(checkpoint / "model.safetensors")
    model = GPT(ModelConfig(**state["model"]), ops).to(tensors["head.weight"].dtype)
    model.load_state_dict(tensors)
    return model.to(device).eval(), checkpoint, state


def find(path: Path) -> Path | None:
    """The checkpoint that `path` is, whole or not; or the newest of the run or folder of them that it is."""
    if path.is_dir() and ((path / "manifest.json").is_file() or path.name.startswith("step-")):
        return path
    return newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)


def newest(root: Path) -> Path | None:
    """The newest valid checkpoint under `root`, None where there is none; names every corrupt one on the way.

    Raises UserError when all are corrupt: beginning anew would bury what may be left of the run.
    """
    steps = _steps(root)
    for path in reversed(steps):
        try:
            verify(path)
        except UserError as error:
            if path == steps[0]:
                raise UserError(
                    f"{error}, and no older one is whole: start afresh in another --out"
                ) from error
            print(f"warning: {error}; falling back to the previous checkpoint", file=sys.stderr)
            continue
        return path
    return None


def verify(path: Path) -> None:
    """Raise UserError unless every file of the checkpoint has the SHA-256 its manifest gives."""
    try:
        expected = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        damaged = [name for name in FILES if sha256_of(path / name) != expected[name]]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"checkpoint {path} is incomplete: {Path(error.filename).name} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is corrupt: manifest.json cannot be read") from error
    if damaged:
        raise UserError(f"checkpoint {path} is corrupt: {damaged[0]} does not match its SHA-256")


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def generators(device: torch.device) -> dict[str, str]:
    """The states of PyTorch's generators for a run on `device`, base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_generators(states: dict[str, str], device: torch.device) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif device.type == name:
            torch.cuda.set_rng_state(state, device)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step-*") if path.is_dir())


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(".step-*"):
        shutil.rmtree(path)


def _optimizer_names(model: Saved, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order of the optimizer's indices."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: Saved, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _optimizer_names(model, optimizer)
    return {
        f"{names[index]}/{entry}": torch.as_tensor(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it reports a full disk under its own type
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # safetensors leaves 0600

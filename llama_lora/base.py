"""Which base an adapter belongs to: some weights, noted with the adapter and compared before it is used.

PER_MATRIX weights of every projection, rounded to bf16, in hexadecimal. Hashes of files would do, but for
copies of the same model in another precision, whose weights are the same once rounded, or nearly.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt.cli import UserError

FLOATING = ("F64", "F32", "F16", "BF16")
PER_MATRIX = 4
ROUNDING = 2.0**-7  # twice what bf16 rounds by: rounded to float16 first, it may fall on either side
SMALLEST = 2.0**-24  # float16 has no steps between this and 0


def sample(directory: Path) -> str:
    """Of the model*.safetensors in a directory; empty where they have no projections of floating point."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        # A damaged file is reported, with its name, by those who load the model.
        with contextlib.suppress(SafetensorError), safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                shape = part.get_shape()
                if name.endswith("_proj.weight") and part.get_dtype() in FLOATING and len(shape) == 2:
                    row = shape[0] // 2
                    found[name] = part[row : row + 1, :PER_MATRIX].flatten()
    if not found:
        return ""
    weights = torch.cat([found[name].float() for name in sorted(found)]).bfloat16()
    return "".join(f"{bits & 0xFFFF:04x}" for bits in weights.view(torch.int16).tolist())


def check(noted: str | None, named: Path, base: Path, adapter: Path) -> None:
    """Raise UserError unless `base` has the weights that were noted of `named`, over which `adapter` trained.

    Those that differ by no more than a rounding are warned of on standard error. Nothing is compared for an
    adapter of another program, which notes none, or a base without safetensors.
    """
    now = sample(base)
    if not noted or not now or noted == now:
        return
    try:
        before, after = _values(noted), _values(now)
    except ValueError as error:
        raise UserError(f"{adapter} is damaged: what it notes of its base is {noted[:20]!r}...") from error
    other = f"the weights in {base} are not those of {named}, over which {adapter} was trained"
    if before.shape != after.shape:
        raise UserError(f"{other}: it has other layers; pass that base with --model")
    tolerance = ROUNDING * torch.maximum(before.abs(), after.abs()) + SMALLEST
    near = ((before - after).abs() <= tolerance) & after.isfinite()
    if far := int((~near).sum()):
        raise UserError(f"{other}: {far} of {before.numel()} compared differ; pass that base with --model")
    print(f"warning: {other}, but no further from them than a copy in another precision", file=sys.stderr)


def _values(text: str) -> Tensor:
    bits = [int(text[start : start + 4], 16) for start in range(0, len(text), 4)]
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()

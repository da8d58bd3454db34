"""One file per op; `cases(device)` returns functions that each build one Case on the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import Case, is_usable

NAMES = (
    "attention", "layer_norm", "rms_norm", "add_norm", "dropout", "bias_gelu", "swiglu", "rope", "embedding",
    "linear", "linear_cross_entropy", "adamw", "nf4", "lora_linear",
)  # fmt: skip


def cases(
    device: torch.device, names: Sequence[str] = NAMES, *, quick: bool = False
) -> list[tuple[str, Callable[[], Case]]]:
    """(op name, function that builds the case) of these ops and their shapes; `quick`: one usable of each."""
    found = []
    for name in names:
        builds = importlib.import_module(f"benchmarks.ops.{name}").cases(device)
        if quick:
            builds = [next(build for build in builds if is_usable(build(), device))]
        found += [(name, build) for build in builds]
    return found

"""The ladder of a fine-tuning step: the techniques of llama_ladder, a step of each taken in turn.

All rungs start from the same adapters and see the same packed rows of random ids. Ceilings and flops count
products with the frozen weights and attention. Rungs with torch.compile take minutes to compile: left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import llama, llama_ladder
from benchmarks.kept_memory import is_kept
from benchmarks.ladder import Ladder, Request, Rung

BATCH_SIZE = 1
QUANTIZED = 0.05
"""Of the loss, which NF4 changes."""
LIBRARIES = ("benchmarks.llama_rungs", "benchmarks.llama_libraries")


class Step(llama.Step):
    """A ladder.Step of a rung of llama_ladder."""

    def __init__(self, options: dict[str, str], path: Path, batch_size: int, device: torch.device) -> None:
        super().__init__(
            options["backend"], options["method"], path, batch_size, device,
            precision=options["precision"], optimizer_bits=int(options["optimizer-bits"]),
        )  # fmt: skip


def build(request: Request, folder: Path) -> Ladder:
    """The ladder of the model at `request.base`, without anything written to `folder`."""
    assert request.base is not None
    rungs = [
        Rung(
            rung.name.removesuffix(", not compiled"),
            partial(Step, rung.options, request.base, request.batch_size, request.device),
        )
        for rung in llama_ladder.RUNGS
        if rung.name != "+ packing" and "--compile" not in rung.flags
    ]
    if request.device.type == "cpu" and is_kept():
        first = rungs[0]
        rungs[:1] = [replace(first, elsewhere=True), replace(first, name="+ kept memory")]
    return Ladder(
        f"llama {request.base.name}", rungs, tolerance=QUANTIZED,
        skipped=["torch.compile: it takes minutes"], modules=LIBRARIES,
    )  # fmt: skip

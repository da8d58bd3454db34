"""One training step (forward, backward, clip, update) of the plain and the optimized GPT, taken in turn.

All start from the same weights and see the same batches. Where the CPU multiplies bfloat16, and on GPUs, the
plain model runs under bf16 autocast as well, and with `compiled` through torch.compile, both with the fused
AdamW of PyTorch. The fraction of the ceiling counts the model's own matrix products (causal attention at
half) against the GEMM peak measured between the steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import ladder
from benchmarks.harness import Row
from benchmarks.kept_memory import is_kept
from gpt.cli import UserError
from gpt.config import PRESETS, TrainConfig, preset
from gpt.hardware import pick_precision, synchronize
from gpt.ops import Ops
from gpt.steps import autocast, model_and_optimizer

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
KEPT = ", memory kept"
VOCAB_SIZE = 8192
"""Of presets that take the tokenizer's."""


def measure(
    name: str, batch_size: int, device: torch.device, rounds: int, *, compiled: bool = False
) -> list[Row]:
    """Rows of the plain models and the optimized one of a preset at `batch_size` windows a step.

    Where this process keeps its memory (see kept_memory), the plain models run in processes that do not, as
    most people run them; one that keeps it, the fastest, is another row. Peak memory is that of processes
    which do not keep it, but for that row.
    """
    kept = device.type == "cpu" and is_kept()
    optimized = pick_precision(settings(name, batch_size, kernels="optimized"), device)
    choices: list[dict[str, Any]] = [{"kernels": "plain"}]
    if optimized == "bf16":
        choices.append({"kernels": "plain", "precision": "bf16-autocast"})
        if compiled:
            choices.append({**choices[-1], "compiled": True})
    choices.append({"kernels": "optimized"})
    rungs = []
    for choice in choices:
        precision = choice.get("precision") or (optimized if choice["kernels"] == "optimized" else "fp32")
        label = f"{choice['kernels']} {precision}{' torch.compile' if choice.get('compiled') else ''}"
        build = partial(Step, name, batch_size=batch_size, device=device, **choice)
        plain = choice["kernels"] == "plain"
        rungs.append(ladder.Rung(label, build, elsewhere=kept and plain))
        if kept and plain and (optimized == "fp32" or precision != "fp32") and not choice.get("compiled"):
            rungs.append(ladder.Rung(label + KEPT, build))
    steps = ladder.Ladder(name, rungs, tolerance=1e-4 if optimized == "fp32" else 1e-2)
    rows = ladder.climb(steps, device, rounds, memory=False).rows
    as_run = [replace(rung, elsewhere=kept and not rung.name.endswith(KEPT)) for rung in rungs]
    for row, peak in zip(rows, ladder.peaks(replace(steps, rungs=as_run), device), strict=True):
        row.subject = f"train {name}"
        row.extra["peak_memory_bytes"] = peak
        del row.ratio_vs["before"]
    return rows


def settings(name: str, batch_size: int, **overrides: Any) -> TrainConfig:
    """The configuration of a preset, which needs no data. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return preset(name, data=Path(), out=Path(), batch_size=batch_size, **overrides)


class Step:
    """A model with its optimizer, a ladder.Step; without `batches` it sees a few random ones in turn.

    `ops` takes the place of the table that `kernels` stands for, `sizes` that of the preset's.
    """

    def __init__(
        self, name: str, kernels: str, batch_size: int, device: torch.device, *,
        precision: str = "auto", compiled: bool = False, checkpointing: bool = False,
        ops: Ops | None = None, batches: Batches | None = None, sizes: Mapping[str, int] | None = None,
        **adamw_options: Any,
    ) -> None:  # fmt: skip
        self.config = settings(
            name, batch_size, kernels=kernels, precision=precision, activation_checkpointing=checkpointing,
            **(sizes or {}),
        )  # fmt: skip
        model = self.config.model(self.config.vocab_size or VOCAB_SIZE)
        self.device, self.precision = device, pick_precision(self.config, device)
        self.label = f"{kernels} {self.precision}{' torch.compile' if compiled else ''}"
        self.shape = f"{batch_size} x {model.block_size}"
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        if kernels == "plain" and self.precision != "fp32":
            adamw_options = {"fused": True, **adamw_options}
        self.model, self.optimizer = model_and_optimizer(
            self.config, model, self.precision, device, ops, **adamw_options
        )
        self.run = torch.compile(self.model) if compiled else self.model
        self.tokens: float = batch_size * model.block_size
        self.flops = model.flops_per_token() * self.tokens
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, model.block_size + 1)
        ids = [torch.randint(model.vocab_size, size, generator=generator).to(device) for _ in range(4)]
        fixed = [(block[:, :-1].contiguous(), block[:, 1:].contiguous()) for block in ids]
        self.fixed = fixed[0]
        self.batches = batches or itertools.cycle(fixed)
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        inputs, targets = next(self.batches)
        with autocast(self.device, self.precision):
            loss = self.run(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())

    def evaluate(self) -> float:
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.precision):
            loss = self.model(*self.fixed).item()
        self.model.train()
        return loss


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a step by op, the largest first, as (op, calls, ms); and what no op accounts for."""

    step_ms: float
    ops: list[tuple[str, float, float]]

    def accounted(self) -> float:
        """Share of the step inside ops; the rest is Python between them and the profiler itself."""
        return sum(ms for _, _, ms in self.ops) / self.step_ms


STEP = "training step"


def profile(step: ladder.Step, device: torch.device, steps: int = 2) -> Profile:
    """Where a step goes. Times are of the CPU, which on a GPU is the side that launches."""
    for _ in range(2):
        step()
    synchronize(device)
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            with torch.profiler.record_function(STEP):
                step()
            synchronize(device)
    # On a GPU the kernels, and the range once more with their time, are events of that device.
    events = {
        event.key: event
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU
    }
    whole = events.pop(STEP)
    ops = [
        (key, event.count / steps, event.self_cpu_time_total / steps / 1e3) for key, event in events.items()
    ]
    return Profile(whole.cpu_time_total / steps / 1e3, sorted(ops, key=lambda op: -op[2]))


def report_profile(found: Profile, title: str, shown: int = 20) -> None:
    table = Table(title=f"{title}: CPU time of a step")
    for column in ("op", "calls", "ms", "share"):
        table.add_column(column, justify="left" if column == "op" else "right")
    lines = [*found.ops[:shown]]
    if rest := found.ops[shown:]:
        lines.append((f"{len(rest)} other ops", sum(op[1] for op in rest), sum(op[2] for op in rest)))
    lines.append(("no op: Python and profiler", 0, found.step_ms * (1 - found.accounted())))
    for key, calls, milliseconds in lines:
        share = f"{100 * milliseconds / found.step_ms:.1f}%"
        table.add_row(key, f"{calls:.0f}", f"{milliseconds:.2f}", share)
    Console().print(table)
    print(f"ops account for {100 * found.accounted():.1f}% of {found.step_ms:.1f} ms")

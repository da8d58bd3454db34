"""One training step (forward, backward, clip, update) of the plain and the optimized GPT, taken in turn.

All start from the same weights and see the same batches. Where the CPU multiplies bfloat16, and on GPUs, the
plain model runs under bf16 autocast as well, and with `compiled` through torch.compile, both with the fused
AdamW of PyTorch. The fraction of the ceiling counts the model's own matrix products (causal attention at
half) against the GEMM peak measured between the steps.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, ceiling, timed
from gpt.cli import UserError
from gpt.config import PRESETS, preset
from gpt.hardware import device_name, pick_precision
from gpt.train import autocast, model_and_optimizer


def measure(
    name: str, batch_size: int, device: torch.device, rounds: int, *, compiled: bool = False
) -> list[Row]:
    """Rows of the plain models and the optimized one of a preset at `batch_size` windows a step."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    optimized = Step(name, "optimized", batch_size, device)
    steps = [Step(name, "plain", batch_size, device)]
    if optimized.precision == "bf16":
        steps.append(Step(name, "plain", batch_size, device, precision="bf16-autocast"))
        if compiled:
            steps.append(Step(name, "plain", batch_size, device, precision="bf16-autocast", compiled=True))
    steps.append(optimized)
    for step in steps[1:]:
        agree(steps[0], step)
    limits = [ceiling("gemm", step.dtype, device) for step in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    limit_seconds: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(rounds):
        for index, step in enumerate(steps):
            seconds[index].append(timed(step, device))
            limit_seconds[index].append(timed(limits[index][0], device))
    rows = []
    for index, step in enumerate(steps):
        median = statistics.median(seconds[index])
        peak = limits[index][1] / statistics.median(limit_seconds[index])
        pairs = zip(seconds[0], seconds[index], strict=True)
        rows.append(
            Row(
                subject=f"train {name}",
                variant=step.label,
                shape=f"{batch_size} x {step.config.block_size}",
                dtype=str(step.dtype).removeprefix("torch."),
                device=device_name(device),
                median_ms=1e3 * median,
                fastest_ms=1e3 * min(seconds[index]),
                slowest_ms=1e3 * max(seconds[index]),
                ratio_vs={steps[0].label: statistics.median([base / own for base, own in pairs])},
                ceiling=f"{peak / 1e9:.0f} GFLOP/s GEMM",
                fraction_of_ceiling=step.flops / median / peak,
                extra={"tokens_per_second": step.tokens / median},
            )
        )
    return rows


def profile(name: str, batch_size: int, device: torch.device, steps: int = 3) -> None:
    """Print what the ops of an optimized step cost, the largest first."""
    step = Step(name, "optimized", batch_size, device)
    for _ in range(2):
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table(title=f"{step.label}, {batch_size} x {step.config.block_size}: CPU time of a step")
    for column in ("op", "calls", "ms", "share"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for event in events[:20]:
        milliseconds = event.self_cpu_time_total / steps / 1e3
        share = f"{100 * event.self_cpu_time_total / total:.1f}%"
        table.add_row(event.key, f"{event.count / steps:.0f}", f"{milliseconds:.2f}", share)
    Console().print(table)


class Step:
    """A model with its optimizer; calling it does one training step on the next of a few fixed batches."""

    def __init__(
        self, name: str, kernels: str, batch_size: int, device: torch.device, *,
        precision: str = "auto", compiled: bool = False,
    ) -> None:  # fmt: skip
        settings = {"kernels": kernels, "batch_size": batch_size, "precision": precision}
        self.config = preset(name, data=Path(), out=Path(), **settings)
        shape = self.config.model(self.config.vocab_size or 8192)
        self.device, self.precision = device, pick_precision(self.config, device)
        self.label = f"{kernels} {self.precision}{' torch.compile' if compiled else ''}"
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        fused = {"fused": True} if kernels == "plain" and self.precision != "fp32" else {}
        self.model, self.optimizer = model_and_optimizer(self.config, shape, self.precision, device, **fused)
        self.run = torch.compile(self.model) if compiled else self.model
        self.tokens = batch_size * shape.block_size
        self.flops = shape.flops_per_token() * self.tokens
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, shape.block_size + 1)
        ids = [torch.randint(shape.vocab_size, size, generator=generator).to(device) for _ in range(4)]
        self.batches = [(block[:, :-1].contiguous(), block[:, 1:].contiguous()) for block in ids]
        self.count = 0

    def loss(self) -> torch.Tensor:
        inputs, targets = self.batches[self.count % len(self.batches)]
        with autocast(self.device, self.precision):
            return self.run(inputs, targets)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.count += 1


def agree(plain: Step, optimized: Step) -> None:
    """Without dropout the two losses of the same weights and batch must be equal to rounding."""
    losses = []
    for step in (plain, optimized):
        step.model.eval()
        with torch.no_grad():
            losses.append(step.loss().item())
        step.model.train()
    tolerance = 1e-4 if optimized.precision == "fp32" else 1e-2
    if abs(losses[0] - losses[1]) > tolerance * abs(losses[0]):
        raise UserError(
            f"plain and optimized disagree, nothing was timed: losses {losses[0]} and {losses[1]}"
        )

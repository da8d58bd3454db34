"""One training step (forward, backward, clip, update) of the plain and the optimized GPT, taken in turn.

Both start from the same weights and see the same batches. The fraction of the ceiling counts the model's own
matrix products (causal attention at half) against the GEMM peak measured between the steps.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from benchmarks.harness import Row, ceiling, timed
from gpt.cli import UserError
from gpt.config import PRESETS, preset
from gpt.hardware import device_name, pick_precision
from gpt.model import GPT
from gpt.ops import load_ops
from gpt.train import autocast


def measure(name: str, batch_size: int, device: torch.device, rounds: int) -> list[Row]:
    """Rows plain and optimized of a preset at `batch_size` windows a step."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    variants = {kernels: Step(name, kernels, batch_size, device) for kernels in ("plain", "optimized")}
    plain, optimized = variants.values()
    agree(plain, optimized)
    limits = {variant: ceiling("gemm", step.dtype, device) for variant, step in variants.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    limit_seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for step in variants.values():
        step()
    for _ in range(rounds):
        for variant, step in variants.items():
            seconds[variant].append(timed(step, device))
            limit_seconds[variant].append(timed(limits[variant][0], device))
    rows = []
    for variant, step in variants.items():
        median = statistics.median(seconds[variant])
        peak = limits[variant][1] / statistics.median(limit_seconds[variant])
        pairs = zip(seconds["plain"], seconds[variant], strict=True)
        rows.append(
            Row(
                subject=f"train {name}",
                variant=f"{variant} {step.precision}",
                shape=f"{batch_size} x {step.config.block_size}",
                dtype=str(step.dtype).removeprefix("torch."),
                device=device_name(device),
                median_ms=1e3 * median,
                fastest_ms=1e3 * min(seconds[variant]),
                slowest_ms=1e3 * max(seconds[variant]),
                ratio_vs={"plain": statistics.median([base / own for base, own in pairs])},
                ceiling=f"{peak / 1e9:.0f} GFLOP/s GEMM",
                fraction_of_ceiling=step.flops / median / peak,
                extra={"tokens_per_second": step.tokens / median},
            )
        )
    return rows


class Step:
    """A model with its optimizer; calling it does one training step on the next of a few fixed batches."""

    def __init__(self, name: str, kernels: str, batch_size: int, device: torch.device) -> None:
        self.config = preset(name, data=Path(), out=Path(), kernels=kernels, batch_size=batch_size)
        shape = self.config.model(self.config.vocab_size or 8192)
        self.device, self.precision = device, pick_precision(self.config, device)
        self.dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        ops = load_ops(self.config.kernels)
        self.model = GPT(shape, ops).initialize(self.config.seed)
        self.model.to(device=device, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32)
        self.optimizer = ops.adamw(
            self.model.parameter_groups(self.config.weight_decay),
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps,
            max_grad_norm=self.config.max_grad_norm,
        )
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
            return self.model(inputs, targets)

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

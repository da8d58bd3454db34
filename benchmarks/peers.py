"""The training step of other projects, on the same sizes, weights and batches where they can take them.

nanoGPT-style   our plain model with SDPA, bf16 autocast, fused AdamW and torch.compile, which nanoGPT is
transformers    GPT2LMHeadModel with our weights, its own loss, bf16 autocast, fused AdamW
llm.c           its CPU trainer, a process with its own weights: GPT-2 small, 4 x 64 tokens, beside ours
Liger, Unsloth  run on GPUs alone
A peer that cannot run here is a line with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import statistics
import subprocess
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ceilings import Ceilings
from benchmarks.gpt_ladder import sdpa
from benchmarks.harness import Row, interleave, make_row
from benchmarks.ladder import Ladder, Rung, climb
from benchmarks.train import Step
from gpt.cli import UserError
from gpt.gpt2 import as_gpt2
from gpt.model import GPT
from gpt.ops import PLAIN

LLMC_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 64, "vocab_size": 50_304}
LLMC_BATCH = 4
LLMC_STEP = re.compile(r"step \d+: train loss \S+ \(took (\S+) ms\)")
LLMC_SECONDS = 120
LLMC_STEPS = 9  # of a process of its own, which does not take turns


def nanogpt(preset: str, batch_size: int, device: torch.device, precision: str, *, compiled: bool) -> Step:
    """Our plain model as nanoGPT runs its own."""
    return Step(
        preset, "plain", batch_size, device, precision=precision, compiled=compiled,
        ops=replace(PLAIN, attention=sdpa), fused=True,
    )  # fmt: skip


class GPT2(nn.Module):
    """transformers' GPT2LMHeadModel with the weights of a plain GPT of ours; forward as GPT's."""

    def __init__(self, ours: GPT) -> None:
        super().__init__()
        self.inner = as_gpt2(ours)
        self.inner.config.use_cache = False

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.inner(input_ids=ids, labels=targets, shift_labels=targets).loss


class TransformersStep(Step):
    """A step of GPT2 in place of our model."""

    def __init__(
        self, preset: str, batch_size: int, device: torch.device, precision: str, **more: Any
    ) -> None:
        super().__init__(preset, "plain", batch_size, device, precision=precision, **more)
        ours = self.model
        assert isinstance(ours, GPT)
        theirs = GPT2(ours).to(device)
        groups = ours.parameter_groups(0.0)
        for group, wanted in zip(groups, (True, False), strict=True):
            group["params"] = [p for p in theirs.parameters() if (p.ndim >= 2) is wanted]
            group["weight_decay"] = self.config.weight_decay if wanted else 0.0
        self.optimizer = PLAIN.adamw(
            groups, lr=self.config.learning_rate, betas=(self.config.beta1, self.config.beta2),
            eps=self.config.eps, max_grad_norm=self.config.max_grad_norm, fused=True,
        )  # fmt: skip
        self.model = self.run = theirs  # type: ignore[assignment]
        self.label = f"transformers {precision}"


def measure(
    preset: str, batch_size: int, device: torch.device, rounds: int, *, compiled: bool, llmc: Path | None
) -> tuple[list[Row], list[str]]:
    """Rows of ours and of every peer there is; a line with the reason for each other."""
    ours = Step(preset, "optimized", 1, device)
    precision = "bf16-autocast" if ours.precision == "bf16" else "fp32"
    rungs = [Rung(f"tapelm {ours.precision}", partial(Step, preset, "optimized", batch_size, device))]
    del ours
    skipped = []
    style = "torch.compile" if compiled else "not compiled"
    rungs.append(
        Rung(
            f"nanoGPT-style {precision}, {style}",
            partial(nanogpt, preset, batch_size, device, precision, compiled=compiled),
        )
    )
    if importlib.util.find_spec("transformers") is None:
        skipped.append("transformers: not installed (pip install -e .[peers])")
    else:
        build = partial(TransformersStep, preset, batch_size, device, precision)
        rungs.append(Rung(f"transformers GPT2LMHeadModel {precision}", build))
    rows = climb(Ladder(preset, rungs), device, rounds, memory=False).rows
    for row in rows:
        row.subject = f"peers {preset}"
        del row.ratio_vs["before"]
    if llmc is None:
        skipped.append("llm.c: no checkout given (--llmc PATH, built with make train_gpt2)")
    elif device.type != "cpu":
        skipped.append("llm.c: its trainer that is measured here is the one for CPUs")
    else:
        rows += measure_llmc(llmc, device, rounds)
    for name, module in (("Liger", "liger_kernel"), ("Unsloth", "unsloth")):
        if device.type != "cuda":
            skipped.append(f"{name}: its kernels run on GPUs alone")
        elif importlib.util.find_spec(module) is None:
            skipped.append(f"{name}: not installed")
        else:
            skipped.append(f"{name}: compared op by op by python -m benchmarks gpu-check, not here")
    return rows, skipped


def measure_llmc(checkout: Path, device: torch.device, rounds: int) -> list[Row]:
    """Steps of llm.c, and of ours on the same shape before and after. Raises UserError without its binary.

    The two cannot take turns step by step, as llm.c is a process of its own.
    """
    binary = checkout / "train_gpt2"
    if not binary.is_file():
        raise UserError(
            f"there is no {binary}: build it with make train_gpt2, and its starter pack, see there"
        )
    step = Step("gpt2", "optimized", LLMC_BATCH, device, sizes=LLMC_SHAPE)
    step()
    ceilings = Ceilings(device, [step.dtype, torch.float32], ["gemm"])
    before = interleave({"ours": step}, ceilings, rounds)["ours"]
    theirs = llmc_seconds(binary, max(rounds, LLMC_STEPS))
    after = interleave({"ours": step}, ceilings, rounds)["ours"]
    middle = statistics.median([*before, *after])
    rows = [
        make_row(
            "peers llm.c's GPT-2", name, step.shape, dtype, device, seconds, ceilings.gemm(dtype), step.flops,
            against={"tapelm": [middle] * len(seconds)},
        )
        for name, dtype, seconds in (
            ("tapelm", step.dtype, [*before, *after]), ("llm.c", torch.float32, theirs),
        )
    ]  # fmt: skip
    for row in rows:
        row.extra["tokens_per_second"] = 1e3 * LLMC_BATCH * LLMC_SHAPE["block_size"] / row.median_ms
    return rows


def llmc_seconds(binary: Path, steps: int) -> list[float]:
    """Of its steps after the first, at most so many, on as many threads as ours."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    # Into a pipe it would print some kB at a time, which may be more than it says until it is stopped.
    with subprocess.Popen(
        ["stdbuf", "-oL", str(binary.resolve())], cwd=binary.parent, env={**os.environ, **threads},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        limit = threading.Timer(LLMC_SECONDS, process.kill)
        limit.start()
        assert process.stdout is not None
        said, found = "", []
        for line in process.stdout:
            said += line
            found = [float(number) / 1e3 for number in LLMC_STEP.findall(said)][1:]
            if len(found) == steps:
                break
        limit.cancel()
        process.kill()
    if not found:
        raise UserError(f"{binary} printed no steps, {LLMC_SECONDS} s at most: {said.strip()[-200:]}")
    return found

"""Every launcher at its shipped bfloat16 shapes beside the time that the roofline predicts; the optimizer's
step; and compiling ahead what these and the tests launch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget

from benchmarks import sweeps
from benchmarks.gpu_parts import Row, Unit
from benchmarks.harness import reason
from benchmarks.ops import adamw
from benchmarks.subjects import BF16, FP16, FP32, SUBJECTS, Subject, meta, random
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.proofs.launches import captured_launches
from tapelm.roofline import Device, datasheet, minimum

ROUNDS = 5
Bench = Callable[..., Any]


def kernels(
    device: torch.device, bench: Bench = triton.testing.do_bench, subjects: Sequence[Subject] = SUBJECTS
) -> list[Unit]:
    return [
        Unit(subject.launcher, "x".join(map(str, shape)), partial(_kernel, device, bench, subject, shape))
        for subject in subjects
        for dtype, shape in subject.shipped
        if dtype == BF16
    ]


def _kernel(device: torch.device, bench: Bench, subject: Subject, shape: tuple[Any, ...]) -> Row:
    arguments = subject.arguments(random(BF16, device=device), *shape)
    # The median of repeated launches with the cache flushed between them, in milliseconds.
    launch = partial(CUDA_LAUNCHERS[subject.launcher], *arguments)
    row: Row = {"measured_us": 1e3 * float(bench(launch, warmup=5, rep=20, return_mode="median"))}
    if (ceilings := datasheet(device)) is not None:
        row["predicted_us"] = 1e6 * minimum(subject.launcher, *arguments).seconds(ceilings, BF16)
        row["fraction_of_ceiling"] = row["predicted_us"] / row["measured_us"]
    return row


def optimizer(device: torch.device) -> list[Unit]:
    """Clip and AdamW; the rows of harness in `rows`."""

    def run(build: Callable[[], Any]) -> Row:
        return {"rows": [asdict(row) for row in sweeps.measure_all([build], device, ROUNDS)]}

    return [
        Unit("clip and AdamW", str(index), partial(run, build))
        for index, build in enumerate(adamw.cases(device))
    ]


def report(rows: Sequence[Row], ceilings: Device | None) -> None:
    known = f"predicted from the data sheet of {ceilings.name}" if ceilings else "nothing is predicted"
    table = Table(title=known)
    for column in ("launcher", "shape", "predicted us", "measured us", "of the ceiling"):
        table.add_column(column, justify="right" if "us" in column else "left")
    nothing = float("nan")
    for row in rows:
        table.add_row(
            row["op"], row["shape"], f"{row.get('predicted_us', nothing):.1f}",
            row.get("error", f"{row.get('measured_us', nothing):.1f}"),
            f"{row.get('fraction_of_ceiling', nothing):.0%}",
        )  # fmt: skip
    Console(width=120).print(table)


def compile_ahead(architecture: str, seconds: float) -> list[str]:
    """Fill Triton's cache on all cores with what tests and benchmarks launch; what did not compile.

    The tests themselves would compile in a few processes, each while the GPU waits.
    """
    deadline = time.monotonic() + seconds
    tasks = [
        (architecture, deadline, index, dtype, shape)
        for index, subject in enumerate(SUBJECTS)
        for dtype, shape in [
            *((dtype, shape) for shape in subject.odd for dtype in dtypes(subject)),
            *subject.shipped,
        ]
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return [error for error in pool.map(compile_one, tasks) if error]


def dtypes(subject: Subject) -> tuple[torch.dtype, ...]:
    """Those that the tests run; no optimizer keeps float16 parameters."""
    return (FP32, BF16) if subject.launcher in ("adamw_step_", "grad_norm") else (FP32, BF16, FP16)


def compile_one(task: tuple[str, float, int, torch.dtype, tuple[Any, ...]]) -> str:
    """Compile the launches of a subject at a shape unless the time is up; empty, or what went wrong."""
    architecture, deadline, index, dtype, shape = task
    subject = SUBJECTS[index]
    if time.monotonic() > deadline:
        return ""
    capability = architecture.removeprefix("sm_")
    nvidia = capability != architecture
    target = GPUTarget("cuda", int(capability), 32) if nvidia else GPUTarget("hip", architecture, 64)
    try:
        with assumed_architecture(architecture), captured_launches() as found:
            CUDA_LAUNCHERS[subject.launcher](*subject.arguments(meta(dtype), *shape))
        for launch in found:
            specialized = launch.specialize(target)
            triton.compile(specialized.source, target=target, options=specialized.options)
    except Exception as error:
        return f"{subject.launcher} {'x'.join(map(str, shape))} {dtype}: {reason(error)}"
    return ""


if __name__ == "__main__":
    # A process that has not touched the GPU, as its children inherit it.
    failures = compile_ahead(sys.argv[1], float(sys.argv[2]))
    print("\n".join(failures))
    sys.exit(1 if failures else 0)

"""Timing by interleaved rounds: A B ceiling, A B ceiling, ...; reported are medians and ratios of one run.

A shared machine drifts by factors within minutes, so that only times taken in turn can be compared.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from gpt.hardware import device_name, synchronize, versions

ROUNDS = 9
COPY_BYTES = 1 << 28
GEMM_SIZE = 1024


@dataclass(frozen=True)
class Case:
    """One shape of one subject with the variants that are timed in turn, the first being the baseline.

    `work` is what the maths needs at the least: flops when `bound` is "gemm", bytes when it is "copy".
    A variant returns its results; `agree` compares them with the baseline's before anything is timed.
    """

    subject: str
    shape: str
    dtype: torch.dtype
    variants: dict[str, Callable[[], Any]]
    bound: str
    work: float
    agree: Callable[[Any, Any], None]


@dataclass
class Row:
    """One line of the table and one object of the JSON."""

    subject: str
    variant: str
    shape: str
    dtype: str
    device: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio_vs: dict[str, float]
    ceiling: str
    fraction_of_ceiling: float
    extra: dict[str, float] = field(default_factory=dict)


def ceiling(bound: str, dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A function that runs at the machine's limit and the work it does: a square product or a large copy."""
    if bound == "gemm":
        a = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)
        b = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)
        return (lambda: torch.mm(a, b)), 2.0 * GEMM_SIZE**3
    source = torch.zeros(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2.0 * source.numel() * 4


def timed(function: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def measure(case: Case, device: torch.device, rounds: int = ROUNDS) -> list[Row]:
    """Check that the variants agree, then time them and the ceiling in turn."""
    names = list(case.variants)
    expected = case.variants[names[0]]()
    for name in names[1:]:
        case.agree(case.variants[name](), expected)
    limit, limit_work = ceiling(case.bound, case.dtype, device)
    limit()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    limit_seconds = []
    for _ in range(rounds):
        for name in names:
            seconds[name].append(timed(case.variants[name], device))
        limit_seconds.append(timed(limit, device))
    limit_rate = limit_work / statistics.median(limit_seconds)
    scale, unit = (1e9, "GFLOP/s GEMM") if case.bound == "gemm" else (1e9, "GB/s copy")
    return [
        Row(
            subject=case.subject,
            variant=name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            device=device_name(device),
            median_ms=1e3 * statistics.median(seconds[name]),
            fastest_ms=1e3 * min(seconds[name]),
            slowest_ms=1e3 * max(seconds[name]),
            ratio_vs={
                names[0]: statistics.median(
                    [base / own for base, own in zip(seconds[names[0]], seconds[name], strict=True)]
                )
            },
            ceiling=f"{limit_rate / scale:.0f} {unit}",
            fraction_of_ceiling=case.work / statistics.median(seconds[name]) / limit_rate,
        )
        for name in names
    ]


def close(rtol: float, atol: float) -> Callable[[Any, Any], None]:
    """Compares the tensors of two results in float32."""

    def agree(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
            torch.testing.assert_close(
                a.float(),
                b.float(),
                rtol=rtol,
                atol=atol,
                msg=lambda text, i=index: f"result {i} is wrong, nothing was timed: {text}",
            )

    return agree


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: machine, threads, date, commit and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "versions": versions(),
    }


def report(title: str, rows: list[Row], device: torch.device, json_path: Path | None) -> None:
    """Print the table; write rows and fingerprint as JSON when a path is given."""
    table = Table(title=title)
    columns = ("op", "shape", "dtype", "variant", "median ms", "min-max", "speed-up", "of ceiling", "ceiling")
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("op", "shape", "variant", "ceiling") else "right"
        )
    for row in rows:
        table.add_row(
            row.subject,
            row.shape,
            row.dtype,
            row.variant,
            f"{row.median_ms:.2f}",
            f"{row.fastest_ms:.2f}-{row.slowest_ms:.2f}",
            f"{next(iter(row.ratio_vs.values())):.2f}x",
            f"{100 * row.fraction_of_ceiling:.0f}%",
            row.ceiling,
        )
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    mark = fingerprint(device)
    console.print(
        f"{mark['device']}, {mark['cpu_capability']}, {mark['date']}, commit {mark['commit']}, "
        f"torch {mark['versions']['torch']}, load {mark['load_average']:.1f}; medians of interleaved rounds"
    )
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": mark, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        json_path.write_text(text, encoding="utf-8")


def measure_all(cases: Sequence[Callable[[], Case]], device: torch.device, rounds: int = ROUNDS) -> list[Row]:
    """Build each case only when its turn comes, so that memory holds one at a time."""
    rows: list[Row] = []
    for build in track(cases, description="measuring", console=Console(stderr=True), transient=True):
        rows += measure(build(), device, rounds)
    return rows

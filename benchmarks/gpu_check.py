"""Everything that needs a GPU, in one command: python -m benchmarks gpu-check, under 8 minutes.

The static proofs; the kernel tests on the device; every launcher with the time that the roofline predicts;
every op beside PyTorch, torch.compile, SDPA and, where installed, Liger; the `seed` preset trained plain and
optimized. Writes benchmarks/results/<gpu>-<date>.json. What no time was left for is named. Without a GPU it
says so and runs the static proofs alone.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import gpu_peers, harness, sweeps
from benchmarks.ops import adamw
from benchmarks.subjects import BF16, SUBJECTS, Subject, random
from gpt.cli import write_atomically
from gpt.hardware import device_name, fingerprint
from tapelm._library import CUDA_LAUNCHERS, architecture
from tapelm.roofline import DEVICES, minimum

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LIMIT = 460.0
"""Seconds after which nothing new is started."""
TEST_SECONDS = 150
TRAIN_STEPS = 200
ROUNDS = 5
Bench = Callable[..., Any]


def run() -> int:
    started = time.monotonic()
    arguments = ["static", "--check"] + (["--seconds", "20"] if torch.cuda.is_available() else [])
    static = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, check=False
    ).returncode
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch sees no GPU here; only the static proofs ran")
        return static
    device = torch.device("cuda")
    tests = run_tests()
    content = {"static": static, "tests": tests, **measure(device, started + LIMIT)}
    content["seconds"] = round(time.monotonic() - started, 1)
    print(f"gpu-check: {content['seconds']:.0f} s; wrote {write(content, device, RESULTS)}")
    return static or tests or int(not content["trained_alike"])


def run_tests() -> int:
    """The tests of tests/kernels and tests/gpt that run on CUDA; exit status, 124 when they took too long."""
    # Most of their time goes into compiling kernels, which processes share through Triton's cache.
    workers = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    command = [
        "-m",
        "pytest",
        "tests/kernels",
        "tests/gpt",
        "-k",
        "cuda or agree",
        "-m",
        "not slow",
        "-n",
        workers,
    ]
    try:
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, timeout=TEST_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"gpu-check: the tests were stopped after {TEST_SECONDS} s")
        return 124


def measure(device: torch.device, deadline: float) -> dict[str, Any]:
    """Everything that is timed on the device."""
    kernels, left = predictions(device, deadline - 150, triton.testing.do_bench)
    report_predictions(kernels, DEVICES.get(architecture(device)))
    peers, more = gpu_peers.measure(device, deadline - 80, triton.testing.do_bench)
    gpu_peers.report(peers)
    optimizer = sweeps.measure_all(adamw.cases(device), device, ROUNDS)
    harness.report("clip and AdamW", optimizer, device)
    try:
        training = train(device, deadline, "seed", TRAIN_STEPS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        # What was measured until here is still written.
        print(f"gpu-check: training failed: {error}")
        training = {"training": str(error), "trained_alike": False}
    left += more
    if left:
        print(f"gpu-check: no time was left for {', '.join(left)}")
    rows = [asdict(row) for row in optimizer]
    return {"kernels": kernels, "peers": peers, "optimizer": rows, **training, "left_out": left}


def predictions(
    device: torch.device, deadline: float, bench: Bench, subjects: Sequence[Subject] = SUBJECTS
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measured and predicted time of every launcher at its shipped bfloat16 shapes; and what was left out."""
    ceilings = DEVICES.get(architecture(device))
    rows, left = [], []
    for subject in subjects:
        for dtype, shape in subject.shipped:
            if dtype != BF16:
                continue
            name = "x".join(map(str, shape))
            if time.monotonic() > deadline:
                left.append(f"{subject.launcher} {name}")
                continue
            arguments = subject.arguments(random(dtype, partial(Tensor.to, device=device)), *shape)
            # The median of repeated launches with the cache flushed between them, in milliseconds.
            launch = partial(CUDA_LAUNCHERS[subject.launcher], *arguments)
            measured = 1e3 * float(bench(launch, warmup=5, rep=20, return_mode="median"))
            row: dict[str, Any] = {"op": subject.launcher, "shape": name, "measured_us": measured}
            if ceilings is not None:
                row["predicted_us"] = 1e6 * minimum(subject.launcher, *arguments).seconds(ceilings, dtype)
                row["fraction_of_ceiling"] = row["predicted_us"] / measured
            rows.append(row)
    return rows, left


def report_predictions(rows: list[dict[str, Any]], ceilings: Any) -> None:
    table = Table(title=f"predicted from the datasheet of {ceilings.name if ceilings else 'nothing known'}")
    for column in ("launcher", "shape", "predicted us", "measured us", "of the ceiling"):
        table.add_column(column, justify="right" if "us" in column else "left")
    nothing = float("nan")
    for row in rows:
        table.add_row(
            row["op"], row["shape"], f"{row.get('predicted_us', nothing):.1f}", f"{row['measured_us']:.1f}",
            f"{row.get('fraction_of_ceiling', nothing):.0%}",
        )  # fmt: skip
    Console(width=120).print(table)


def train(device: torch.device, deadline: float, preset: str, steps: int) -> dict[str, Any]:
    """`gpt.train` of the preset with both tables of ops on this repository's own text; their summaries."""
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": each}) + "\n" for each in own_text()), encoding="utf-8")
        prepare = ["data.prepare", "--source", "files", "--input", str(text), "--out", str(folder / "data")]
        program([*prepare, "--split", "hash", "--vocab-size", "4096"], deadline)
        for kernels in ("plain", "optimized"):
            out = folder / kernels
            arguments = ["--preset", preset, "--kernels", kernels, "--max-steps", str(steps)]
            arguments += ["--data", str(folder / "data"), "--out", str(out), "--device", str(device)]
            program(["gpt.train", *arguments], deadline)
            runs[kernels] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    losses = [summary["val_loss"] for summary in runs.values()]
    speeds = [summary["tokens_per_second"] for summary in runs.values()]
    print(
        f"{preset}, {steps} steps: validation loss {losses[0]:.4f} plain, {losses[1]:.4f} optimized; "
        f"{speeds[0]:,.0f} and {speeds[1]:,.0f} tokens/s ({speeds[1] / speeds[0]:.2f}x)"
    )
    # bfloat16 weights against float32 ones, and other dropout masks.
    return {"training": runs, "trained_alike": abs(losses[0] - losses[1]) < 0.05 * losses[0]}


def own_text() -> list[str]:
    """The repository's Python, C++ and Markdown in documents of about 4,000 characters."""
    folders = ("kernels", "csrc", "gpt", "data", "benchmarks", "tests")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))]
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in files
        if path.suffix in (".py", ".cpp", ".inl", ".h", ".md")
    )
    text = text.replace("<|", "< |")  # marks that data.prepare keeps for itself
    return [text[first : first + 4000] for first in range(0, len(text), 4000)]


def program(arguments: list[str], deadline: float) -> None:
    """Runs one of our programs to its end, which must be a good one and before the deadline."""
    subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        timeout=max(1.0, deadline - time.monotonic()),
        check=True,
    )


def write(content: dict[str, Any], device: torch.device, folder: Path) -> Path:
    """Writes the results with the machine's fingerprint; returns the file."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = folder / f"{name}-{datetime.date.today().isoformat()}.json"
    write_atomically(path, json.dumps({"machine": fingerprint(device), **content}, indent=1) + "\n")
    return path

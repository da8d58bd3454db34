"""Everything that needs a GPU, in one command: python -m benchmarks gpu-check, under 8 minutes.

The static proofs; the kernel tests on the device; every op beside PyTorch and torch.compile with the time the
roofline predicts; the `seed` preset trained plain and optimized. Writes benchmarks/results/<gpu>-<date>.json.
Without a GPU it says so and runs the static proofs alone.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks import harness, ops, train
from benchmarks.subjects import BF16, SUBJECTS, random
from gpt.hardware import device_name
from tapelm._library import CUDA_LAUNCHERS, architecture
from tapelm.roofline import DEVICES, minimum

RESULTS = Path(__file__).parent / "results"
ROUNDS = 5


def run() -> int:
    started = time.monotonic()
    static = subprocess.run([sys.executable, "-m", "benchmarks", "static", "--check"], check=False).returncode
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch sees no GPU here; only the static proofs ran")
        return static
    tests = subprocess.run([sys.executable, "-m", "pytest", "tests/kernels", "-m", "not slow"], check=False)
    device = torch.device("cuda")
    kernels = predictions(device)
    rows = harness.measure_all([build for _, build in ops.cases(device)], device, ROUNDS)
    rows += train.measure("seed", 16, device, ROUNDS)
    harness.report("python -m benchmarks gpu-check", rows, device, None)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"
    content = {
        "machine": harness.fingerprint(device), "static": static, "tests": tests.returncode,
        "kernels": kernels, "rows": [asdict(row) for row in rows], "seconds": time.monotonic() - started,
    }  # fmt: skip
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    print(f"gpu-check: {content['seconds']:.0f} s; wrote {path}")
    return static or tests.returncode


def predictions(device: torch.device) -> list[dict[str, Any]]:
    """Prints measured beside predicted time of every launcher at its shipped half-precision shapes."""
    target = architecture(device)
    ceilings = DEVICES.get(target)
    table = Table(title=f"predicted from the datasheet of {ceilings.name if ceilings else 'nothing known'}")
    for column in ("op", "shape", "predicted us", "measured us", "of the ceiling"):
        table.add_column(column, justify="right" if "us" in column else "left")
    rows = []
    for subject in SUBJECTS:
        for dtype, shape in subject.shipped:
            if dtype != BF16:
                continue
            make = random(dtype, partial(torch.Tensor.to, device=device))
            arguments = subject.arguments(make, *shape)
            # The median of repeated launches with the cache flushed between them, in milliseconds.
            launch = partial(CUDA_LAUNCHERS[subject.launcher], *arguments)
            milliseconds: Any = triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
            measured = 1e3 * milliseconds
            row: dict[str, Any] = {
                "op": subject.launcher, "shape": "x".join(map(str, shape)), "measured_us": measured,
            }  # fmt: skip
            if ceilings is not None:
                row["predicted_us"] = 1e6 * minimum(subject.launcher, *arguments).seconds(ceilings, dtype)
                row["fraction_of_ceiling"] = row["predicted_us"] / measured
            rows.append(row)
            table.add_row(
                row["op"], row["shape"], f"{row.get('predicted_us', float('nan')):.1f}", f"{measured:.1f}",
                f"{row.get('fraction_of_ceiling', float('nan')):.0%}",
            )  # fmt: skip
    Console(width=120).print(table)
    return rows

"""Everything that needs a GPU, in one command: python -m benchmarks gpu-check, under 8 minutes.

The static proofs; the kernel tests on the device; every launcher with the time that the roofline predicts;
every op beside PyTorch, torch.compile, SDPA and, where installed, Liger; the `seed` preset trained plain and
optimized. Writes benchmarks/results/<gpu>-<date>.json after each part. An error is a row of its part, and the
check fails at its end. What no time was left for is named. Without a GPU it says so and runs the static
proofs alone.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_kernels, gpu_parts, gpu_peers, harness
from benchmarks.gpu_parts import ROOT, finish
from gpt.cli import write_atomically
from gpt.hardware import device_name, fingerprint
from tapelm._library import architecture
from tapelm.roofline import datasheet

RESULTS = Path(__file__).parent / "results"
LIMIT = 460.0
"""Seconds after which nothing new is started."""
STATIC_SECONDS, COMPILE_SECONDS, TEST_SECONDS = 90, 60, 150
RESERVED = {"kernels": 170.0, "peers": 110.0, "optimizer": 90.0}
"""Seconds before LIMIT at which a part's time is up, so that the last, training, has its own."""
TRAIN_STEPS = 200


def run() -> int:
    started, has_gpu = time.monotonic(), torch.cuda.is_available()
    static = run_static(has_gpu)
    if not has_gpu:
        print("gpu-check: PyTorch sees no GPU here; only the static proofs ran")
        return static
    device = torch.device("cuda")
    path, machine = free_path(device, RESULTS), fingerprint(device)
    content: dict[str, Any] = {"static": static}

    def keep(found: dict[str, Any]) -> None:
        content.update(found, seconds=round(time.monotonic() - started, 1))
        write_atomically(path, json.dumps({"machine": machine, **content}, indent=1) + "\n")

    if datasheet(device) is None:
        print(f"gpu-check: no data sheet of {device_name(device)} is known: its ceilings are those measured")
    keep({"compiled_ahead": compile_ahead(architecture(device))})
    keep({"tests": run_tests()})
    measure(device, started + LIMIT, keep)
    found = failures(content)
    print("".join(f"gpu-check: failed: {line}\n" for line in found), end="")
    print(f"gpu-check: {content['seconds']:.0f} s; wrote {path}")
    return static or content["tests"] or int(bool(found))


def run_static(has_gpu: bool) -> int:
    """Exit status of the static proofs, 124 when they took too long."""
    command = [sys.executable, "-m", "benchmarks", "static", "--check"]
    if not has_gpu:
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    return _status("the static proofs", finish([*command, "--seconds", "20"], STATIC_SECONDS), STATIC_SECONDS)


def compile_ahead(name: str) -> int:
    """Exit status of compiling the kernels for the architecture `name`; what it leaves is compiled later."""
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", name, str(COMPILE_SECONDS)]
    seconds = COMPILE_SECONDS + gpu_parts.GRACE
    return _status("compiling ahead", finish(command, seconds), seconds)


def run_tests() -> int:
    """The tests of tests/kernels and tests/gpt that run on CUDA; exit status, 124 when they took too long."""
    # Most of their time goes into compiling kernels, which processes share through Triton's cache.
    workers = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
    tests = ["tests/kernels", "tests/gpt", "-k", "cuda or agree", "-m", "not slow", "-n", workers]
    status = finish([sys.executable, "-m", "pytest", *tests], TEST_SECONDS)
    return _status("the tests", status, TEST_SECONDS)


def _status(what: str, status: int | None, seconds: float) -> int:
    if status is None:
        print(f"gpu-check: {what} were stopped after {seconds:.0f} s")
    return 124 if status is None else status


def measure(device: torch.device, deadline: float, keep: Callable[[dict[str, Any]], None]) -> None:
    """Everything that is timed on the device; `keep` gets each part."""
    left: list[str] = []
    for part, reserved in RESERVED.items():
        rows = gpu_parts.measure(part, deadline - reserved)
        left += [f"{row['op']} {row['shape']}" for row in rows if "left_out" in row]
        keep({part: rows, "left_out": left})
        done = [row for row in rows if "left_out" not in row]
        if part == "kernels":
            gpu_kernels.report(done, datasheet(device))
        elif part == "peers":
            gpu_peers.report(done)
        else:
            found = [harness.Row(**each) for row in done for each in row.get("rows", ())]
            harness.report("clip and AdamW", found, device)
    if left:
        print(f"gpu-check: no time was left for {', '.join(left)}")
    try:
        keep(train(device, deadline, "seed", TRAIN_STEPS))
    except (subprocess.SubprocessError, OSError, ValueError, KeyError) as error:
        keep({"training": harness.reason(error), "trained_alike": False})


def failures(content: dict[str, Any]) -> list[str]:
    """What makes the check fail beside the static proofs and the tests, one line each."""
    found = [
        f"{row['op']} {row['shape']}: {row['error']}"
        for part in RESERVED
        for row in content.get(part, ())
        if "error" in row
    ]
    if not content.get("trained_alike"):
        training = content.get("training")
        found.append(f"training: {training if isinstance(training, str) else 'the losses differ'}")
    return found


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
    seconds = deadline - time.monotonic()
    status = finish([sys.executable, "-m", *arguments], seconds)
    if status is None:
        raise subprocess.TimeoutExpired(arguments[0], seconds)
    if status:
        raise subprocess.CalledProcessError(status, arguments[0])


def free_path(device: torch.device, folder: Path) -> Path:
    """Where results of this device and day go; those of an earlier run of the same day stay."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    stem, count = f"{name}-{datetime.date.today().isoformat()}", 1
    path = folder / f"{stem}.json"
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path

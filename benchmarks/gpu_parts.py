"""Parts of `gpu-check`, each in processes of its own: python -m benchmarks.gpu_parts PART FIRST SECONDS FILE

A row that fails holds its error and the others are measured. Where the error leaves the GPU unusable to its
process, or ends that, another process goes on with the row behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import reason
from gpt.cli import write_atomically

ROOT = Path(__file__).parent.parent
PARTS = {
    "kernels": "benchmarks.gpu_kernels", "peers": "benchmarks.gpu_peers",
    "optimizer": "benchmarks.gpu_kernels",
}  # fmt: skip
"""The module whose function `PART(device)` gives the units."""
GRACE = 15.0
"""Seconds that a row has to end after its part's time is up."""
UNUSABLE = 7
"""Exit status of a process that another one has to take over from."""
UNFINISHED = "no result"

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """What becomes one row: the op, the shape and what `run` returns."""

    op: str
    shape: str
    run: Callable[[], Row]


def attempt(unit: Unit) -> Row:
    """The row, with the error in it if there was one."""
    row: Row = {"op": unit.op, "shape": unit.shape}
    try:
        return {**row, **unit.run()}
    except Exception as error:
        traceback.print_exc()
        return {**row, "error": reason(error)}


def take(units: Sequence[Unit], seconds: float, path: Path, usable: Callable[[], bool]) -> int:
    """Write the rows to `path`, after each of them; none begins after so many seconds. The exit status."""
    deadline, rows = time.monotonic() + seconds, []
    for unit in units:
        names = {"op": unit.op, "shape": unit.shape}
        if time.monotonic() > deadline:
            rows.append({**names, "left_out": True})
            continue
        # What is found here if the process does not live to replace it.
        write_atomically(path, json.dumps([*rows, {**names, "error": UNFINISHED}]))
        rows.append(attempt(unit))
        write_atomically(path, json.dumps(rows))
        if "error" in rows[-1] and not usable():
            return UNUSABLE
    write_atomically(path, json.dumps(rows))
    return 0


def measure(part: str, deadline: float) -> list[Row]:
    """All rows of a part; those that no time was left for have `left_out`."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        while True:
            path, left = Path(folder) / f"{len(rows)}.json", deadline - time.monotonic()
            module = "benchmarks.gpu_parts"
            command = [sys.executable, "-m", module, part, str(len(rows)), str(left), str(path)]
            status = finish(command, left + GRACE)
            found: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            if found and found[-1].get("error") == UNFINISHED:
                told = "it took too long" if status is None else f"its process ended with status {status}"
                found[-1]["error"] = f"{UNFINISHED}: {told}"
            rows += found
            if not found and status != 0:
                rows.append({"op": part, "shape": "", "error": f"nothing was measured, status {status}"})
            # What is behind a row that took too long is named by a last process, which measures nothing more.
            if not found or status == 0:
                return rows


def finish(command: Sequence[str], seconds: float) -> int | None:
    """Exit status; None where it took longer and was ended, with every process that it had started."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def usable(device: torch.device) -> bool:
    """Whether this process can still use the GPU; an illegal access ends that for good."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        print(f"gpu-check: another process goes on: {reason(error)}", flush=True)
        return False
    return True


def main(part: str, first: str, seconds: str, path: str) -> int:
    device = torch.device("cuda")
    units = getattr(importlib.import_module(PARTS[part]), part)(device)
    return take(units[int(first) :], float(seconds), Path(path), lambda: usable(device))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

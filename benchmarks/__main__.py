"""Benchmarks: python -m benchmarks {ops,train,tokenizer,loader,all,gpu-check} [--json FILE]

ops        every kernel against PyTorch, forward and backward
train      a whole training step, plain against optimized
tokenizer  encoding and training a tokenizer, against its peers
loader     batches per second against DataLoader, opening, files to shards
all        all of these
gpu-check  everything that needs a GPU: tests on the device, ops and train
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from benchmarks import harness, loader, ops, tokenizer, train
from gpt.cli import UserError, prepare_output, run_program
from gpt.hardware import pick_device, set_threads


@dataclass(frozen=True)
class Options:
    """Options of `python -m benchmarks`."""

    subject: Annotated[
        Literal["ops", "train", "tokenizer", "loader", "all", "gpu-check"], tyro.conf.Positional
    ]
    json: Path | None = None
    """Write the rows here as JSON."""
    preset: str = "seed"
    """Preset of the training step."""
    batch_size: int = 16
    rounds: int = harness.ROUNDS
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    only: str = ""
    """ops: only those whose name contains this."""
    text: Path | None = None
    """tokenizer: a .txt or .jsonl(.gz) file, or a directory of them."""


def run(options: Options) -> int:
    if options.rounds < 1 or options.batch_size < 1:
        raise UserError("--rounds and --batch-size must be at least 1")
    set_threads(options.threads)
    device = pick_device(options.device)
    if options.json is not None:
        prepare_output(options.json)
    rows: list[harness.Row] = []
    if options.subject in ("ops", "all", "gpu-check"):
        cases = [case for name, case in ops.cases(device) if options.only in name]
        if not cases:
            raise UserError(f"no op is called {options.only!r}; there are: {', '.join(ops.NAMES)}")
        rows += harness.measure_all(cases, device, options.rounds)
    if options.subject in ("train", "all", "gpu-check"):
        rows += train.measure(options.preset, options.batch_size, device, options.rounds)
    if options.subject in ("tokenizer", "all"):
        rows += tokenizer.measure(options.text, options.rounds)
    if options.subject in ("loader", "all"):
        rows += loader.measure_all(device, options.rounds, options.preset, options.batch_size)
    harness.report(f"python -m benchmarks {options.subject}", rows, device, options.json)
    return 0


def gpu_check(options: Options) -> int:
    if not torch.cuda.is_available():
        print("gpu-check: PyTorch sees no GPU here, nothing to check on one")
        return 0
    tests = subprocess.run([sys.executable, "-m", "pytest", "tests/kernels", "-m", "gpu"], check=False)
    return tests.returncode or run(options)


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, args=arguments, prog="python -m benchmarks")
    return gpu_check(options) if options.subject == "gpu-check" else run(options)


if __name__ == "__main__":
    run_program(main)

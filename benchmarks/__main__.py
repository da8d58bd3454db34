"""Benchmarks: python -m benchmarks {ops,train,tokenizer,loader,static,tune,all,gpu-check} [--json FILE]

ops        every kernel against PyTorch, forward and backward
train      a whole training step, plain against optimized
tokenizer  encoding and training a tokenizer, against its peers
loader     batches per second against DataLoader, opening, files to shards
static     compiles every Triton kernel for every target, no GPU needed; --check compares with the lock file
tune       measures launch configurations on the GPU at hand and writes the table that the library reads
all        ops, train, tokenizer and loader
gpu-check  everything that needs a GPU: tests on the device, ops and train
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks import gpu_check, harness, loader, ops, static, static_peers, tokenizer, train, tune
from gpt.cli import UserError, parse_options, prepare_output, run_program
from gpt.hardware import pick_device, set_threads


@dataclass(frozen=True)
class Options:
    """Options of `python -m benchmarks`."""

    subject: Annotated[
        Literal["ops", "train", "tokenizer", "loader", "static", "tune", "all", "gpu-check"],
        tyro.conf.Positional,
    ]
    json: Path | None = None
    """Write the rows here as JSON."""
    preset: str = "seed"
    """Preset of the training step."""
    batch_size: int = 16
    compiled: bool = False
    """train: also time the plain model through torch.compile, where it runs in bf16."""
    profile: bool = False
    """train: print what each op of the optimized step costs instead."""
    rounds: int = harness.ROUNDS
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    only: str = ""
    """ops, tune: only those whose name contains this."""
    text: Path | None = None
    """tokenizer: a .txt or .jsonl(.gz) file, or a directory of them."""
    check: bool = False
    """static: change nothing, fail when what compiles now differs from the lock file."""
    peers: bool = False
    """static: compile other libraries' kernels instead, where installed, beside ours."""
    seconds: float = float("inf")
    """static: start no compilation after this many seconds; run it again for the rest. tune: the same for
    kernels, leaving the others as they ship."""


def run(options: Options) -> int:
    if options.rounds < 1 or options.batch_size < 1:
        raise UserError("--rounds and --batch-size must be at least 1")
    set_threads(options.threads)
    device = pick_device(options.device)
    if options.json is not None:
        prepare_output(options.json)
    if options.profile:
        train.profile(options.preset, options.batch_size, device)
        return 0
    rows: list[harness.Row] = []
    if options.subject in ("ops", "all"):
        cases = [case for name, case in ops.cases(device) if options.only in name]
        if not cases:
            raise UserError(f"no op is called {options.only!r}; there are: {', '.join(ops.NAMES)}")
        rows += harness.measure_all(cases, device, options.rounds)
    if options.subject in ("train", "all"):
        rows += train.measure(
            options.preset, options.batch_size, device, options.rounds, compiled=options.compiled
        )
    if options.subject in ("tokenizer", "all"):
        rows += tokenizer.measure(options.text, options.rounds)
    if options.subject in ("loader", "all"):
        rows += loader.measure_all(device, options.rounds, options.preset, options.batch_size)
    harness.report(f"python -m benchmarks {options.subject}", rows, device, options.json)
    return 0


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, prog="python -m benchmarks")
    if options.subject == "gpu-check":
        return gpu_check.run()
    if options.subject == "static" and options.peers:
        static_peers.report()
        return 0
    if options.subject == "static":
        return static.run(options.check, options.seconds)
    if options.subject == "tune":
        return tune.run(options.only, options.json, options.seconds)
    return run(options)


if __name__ == "__main__":
    run_program(main)

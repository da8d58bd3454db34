"""Benchmarks: python -m benchmarks SUBJECT [--json FILE], where SUBJECT is one of

ops        every kernel against PyTorch, forward and backward
train      a whole training step, plain against optimized
tokenizer  encoding and training a tokenizer, against its peers
loader     batches per second against DataLoader, opening, files to shards
llama      fine-tuning steps and decoding, against peft, bitsandbytes and transformers
ladder     what each technique does to a fine-tuning: --model llama --base DIR --data DIR
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
        Literal[
            "ops", "train", "tokenizer", "loader", "llama", "ladder", "static", "tune", "all", "gpu-check"
        ],
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
    base: Path = Path("runs/smollm2")
    """llama, ladder: a local Llama model; SmolLM2-135M is fetched there if there is none."""
    model: Literal["llama"] = "llama"
    """ladder: which model's techniques."""
    data: Path = Path("runs/corpus")
    """ladder: what to train on, as for python -m llama_lora.finetune."""
    out: Path = Path("runs/ladder")
    """ladder: the runs go here; those that are there are not taken again."""
    steps: int = 30
    """ladder: optimizer steps of each run."""
    sweeps: bool = False
    """ladder: also sweep batch size and rank."""
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
    if options.subject == "llama":
        from benchmarks import llama

        rows += llama.measure(fetched(options.base), options.batch_size, device, options.rounds)
    harness.report(f"python -m benchmarks {options.subject}", rows, device, options.json)
    return 0


def fetched(base: Path) -> Path:
    """`base`, filled with SmolLM2-135M where there is no model yet."""
    from llama_lora.fetch import fetch

    return base if (base / "config.json").is_file() else fetch(base)


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, prog="python -m benchmarks")
    if options.subject == "gpu-check":
        return gpu_check.run()
    if options.subject == "static" and options.peers:
        static_peers.report()
        return 0
    if options.subject == "ladder":
        from benchmarks import llama_ladder

        return llama_ladder.run(
            fetched(options.base), options.data, options.out, options.steps, sweeps=options.sweeps,
            json_path=options.json,
        )  # fmt: skip
    if options.subject == "static":
        return static.run(options.check, options.seconds)
    if options.subject == "tune":
        return tune.run(options.only, options.json, options.seconds)
    return run(options)


if __name__ == "__main__":
    run_program(main)

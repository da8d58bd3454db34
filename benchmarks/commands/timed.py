"""Subjects that are timed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import tyro

from benchmarks import compare, harness, kept_memory, loader, ops, peers, scaling, sweeps, tokenizer, train
from benchmarks.elsewhere import result_of
from benchmarks.harness import Case, Row
from gpt.cli import UserError, prepare_output
from gpt.hardware import pick_device, set_threads

Flag = tyro.conf.FlagCreatePairsOff[bool]
SMOLLM2 = Path("runs/smollm2")


@dataclass(frozen=True)
class Timed:
    """Options of whatever is timed."""

    name: ClassVar[str]
    json: Path | None = None
    """Write the rows here as JSON."""
    rounds: int = harness.ROUNDS
    """Rounds in which all variants are taken in turn."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""

    def begin(self) -> torch.device:
        """Before anything is measured: refuses what cannot be, sets the threads."""
        for name in ("rounds", "batch_size"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        text = getattr(self, "text", None)
        if text is not None and not text.exists():
            raise UserError(f"--text: there is no {text}")
        set_threads(self.threads)
        device = pick_device(getattr(self, "device", "cpu"))
        if self.json is not None:
            prepare_output(self.json)
        return device

    def finish(
        self, rows: Sequence[Row], device: torch.device, printed: Sequence[Row] = (), **sections: Any
    ) -> int:
        """Writes the rows and those that have been `printed`, and prints the others."""
        self.write([*rows, *printed], device, **sections)
        harness.report(f"python -m benchmarks {self.name}", rows, device)
        return 0

    def write(self, rows: Sequence[Row], device: torch.device, **sections: Any) -> None:
        """Where it is asked for."""
        if self.json is not None:
            harness.write_results(self.json, device, rows, **sections)


@dataclass(frozen=True)
class Measuring(Timed):
    """On a CPU or a GPU."""

    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one."""


@dataclass(frozen=True)
class Ops(Measuring):
    """Every kernel against PyTorch, forward and backward."""

    name: ClassVar[str] = "ops"
    only: str = ""
    """Only those whose name contains this."""
    check: Flag = False
    """Fail when a kernel is wrong, or slower than the committed ratios by more than the noise."""
    quick: Flag = False
    """One shape of each."""

    def run(self) -> int:
        if self.check and self.json is not None:
            raise UserError("--check compares and writes no rows: leave out --json")
        device = self.begin()
        cases = cases_of(device, self.only, quick=self.quick)
        if self.check:
            return compare.check(cases, device, self.rounds)
        swept = sweeps.Sweeps(cases, device, self.rounds)
        while swept.left:
            swept.sweep()
            self.write(swept.rows(), device, errors=swept.errors)
        self.finish(swept.rows(), device, errors=swept.errors)
        return report_failed(swept)


def report_failed(swept: sweeps.Sweeps) -> int:
    """Names what of ours did not run; the exit status."""
    for line in swept.failed():
        print(f"FAILED: {line}")
    return int(bool(swept.failed()))


def cases_of(device: torch.device, only: str, *, quick: bool = False) -> list[Callable[[], Case]]:
    """Of the ops whose name contains `only`."""
    names = [name for name in ops.NAMES if only in name]
    if not names:
        raise UserError(f"no op is called {only!r}; there are: {', '.join(ops.NAMES)}")
    return [case for _, case in ops.cases(device, names, quick=quick)]


@dataclass(frozen=True)
class Train(Measuring):
    """A whole training step, plain against optimized."""

    name: ClassVar[str] = "train"
    preset: str = "seed"
    """Of gpt.train: demo, seed, finance, tape or gpt2."""
    batch_size: int = 16
    """Windows (sequences) in a step."""
    compiled: Flag = False
    """Also time the plain model through torch.compile, where it runs in bf16."""
    profile: Flag = False
    """Print what each op of the optimized step costs instead."""

    def run(self) -> int:
        if self.profile and self.json is not None:
            raise UserError("--profile prints a table and writes no rows: leave out --json")
        device = self.begin()
        if self.profile:
            step = train.Step(self.preset, "optimized", self.batch_size, device)
            train.report_profile(train.profile(step, device), f"{step.label}, {step.shape}")
            return 0
        rows = train.measure(self.preset, self.batch_size, device, self.rounds, compiled=self.compiled)
        return self.finish(rows, device)


@dataclass(frozen=True)
class Tokenizer(Timed):
    """Encoding and training a tokenizer, against its peers."""

    name: ClassVar[str] = "tokenizer"
    text: Path | None = None
    """A .txt or .jsonl(.gz) file, or a directory of them."""

    def run(self) -> int:
        device = self.begin()
        return self.finish(alone(tokenizer.measure, self.text, self.rounds), device)


@dataclass(frozen=True)
class Loader(Timed):
    """Batches per second against DataLoader, opening, files to shards."""

    name: ClassVar[str] = "loader"
    preset: str = "seed"
    """Of the training step whose batches are taken."""
    batch_size: int = 16
    """Windows in a batch."""
    text: Path | None = None
    """A .txt or .jsonl(.gz) file, or a directory of them, to encode; without one, made-up words."""

    def run(self) -> int:
        device = self.begin()
        rows = alone(loader.measure_all, self.rounds, self.preset, self.batch_size, self.text)
        return self.finish(rows, device)


def alone(measure: Callable[..., list[Row]], *arguments: Any) -> list[Row]:
    """What `measure` gives in a process of its own, where memory is as the C library has it."""
    with (
        kept_memory.given_back(),
        ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=set_threads,
            initargs=(torch.get_num_threads(),),
        ) as pool,
    ):
        return result_of(pool, measure, *arguments)


@dataclass(frozen=True)
class Llama(Measuring):
    """Fine-tuning steps and decoding, against peft, bitsandbytes and transformers."""

    name: ClassVar[str] = "llama"
    base: Path = SMOLLM2
    """A local Llama model; SmolLM2-135M is fetched there if there is none."""
    batch_size: int = 16
    """Windows in a step."""
    unsloth: Path | None = None
    """The Python of an environment in which Unsloth is installed, to time its steps as well."""

    def run(self) -> int:
        from benchmarks import llama

        device = self.begin()
        if self.unsloth is None:
            print("skipped: Unsloth: name the Python of an environment that has it with --unsloth")
        rows = llama.measure(
            fetched(self.base), self.batch_size, device, self.rounds, self.unsloth,
            save=lambda rows: self.write(rows, device),
        )  # fmt: skip
        return self.finish(rows, device)


@dataclass(frozen=True)
class Generate(Measuring):
    """Greedy text of a GPT, token by token: cache, kernels and bf16, against transformers."""

    name: ClassVar[str] = "generate"
    checkpoint: Path | None = None
    """A run directory or one of its checkpoints; without one, random weights of --preset."""
    preset: str = "seed"
    """Of gpt.train: demo, seed, finance, tape or gpt2."""
    prompt_tokens: int = 128
    """Tokens that are read at once."""
    new_tokens: int = 64
    """Tokens made, one after the other; with the prompt they have to fit the block."""

    def run(self) -> int:
        from benchmarks import generate

        device = self.begin()
        rows, skipped = generate.measure(
            self.checkpoint, self.preset, self.prompt_tokens, self.new_tokens, device, self.rounds
        )
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        return self.finish(rows, device, skipped=skipped)


@dataclass(frozen=True)
class Peers(Measuring):
    """The training step of nanoGPT, transformers and llm.c beside ours."""

    name: ClassVar[str] = "peers"
    rounds: int = 5
    preset: str = "seed"
    """Of gpt.train: demo, seed, finance, tape or gpt2."""
    batch_size: int = 4
    """Windows (sequences) in a step."""
    no_compiled: Flag = False
    """Leave out torch.compile, which takes a minute to compile."""
    llmc: Path | None = None
    """A checkout of llm.c with its train_gpt2 built."""

    def run(self) -> int:
        device = self.begin()
        rows, skipped = peers.measure(
            self.preset, self.batch_size, device, self.rounds, compiled=not self.no_compiled, llmc=self.llmc
        )
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        return self.finish(rows, device, skipped_peers=skipped)


@dataclass(frozen=True)
class Scaling(Measuring):
    """What a step costs over batch, sequence, width, depth, vocabulary and threads; fits the planner."""

    name: ClassVar[str] = "scaling"
    rounds: int = 5

    def run(self) -> int:
        device = self.begin()
        rows, plan = scaling.measure(device, self.rounds)
        return self.finish([], device, rows, plan=plan)


def fetched(base: Path) -> Path:
    """`base`, filled with SmolLM2-135M where there is nothing yet."""
    from llama_lora.fetch import fetch

    if (base / "config.json").is_file():
        return base
    if base.exists() and (not base.is_dir() or any(base.iterdir())):
        raise UserError(f"--base: {base} is no Llama model, which is a directory with config.json")
    return fetch(base)

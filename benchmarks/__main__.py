"""Benchmarks: python -m benchmarks SUBJECT [--json FILE]

ops        every kernel against PyTorch, forward and backward
train      a whole training step, plain against optimized
ladder     the training step with one optimization more on every line, and with one removed
           (--model llama: what each technique does to a fine-tuning, --base DIR --data DIR)
tokenizer  encoding and training a tokenizer, against its peers
loader     batches per second against DataLoader, opening, files to shards
static     compiles every Triton kernel for every target, no GPU needed; --check compares with the lock file
tune       measures launch configurations on the GPU at hand and writes the table that the library reads
llama      fine-tuning steps and decoding, against peft, bitsandbytes and transformers
scaling    what a step costs over batch, sequence, width, depth, vocabulary and threads; fits the planner
plan       step time, memory and cost of a preset on GPUs, from the roofline; measures nothing
all        ops, the ladders of both models, peers, tokenizer and loader; --out takes the report
gpu-check  everything that needs a GPU: tests on the device, ops and train
peers      the training step of nanoGPT, transformers and llm.c beside ours
models     a table of run directories of gpt and llama_lora on the same held-out text
compare    two JSON files of one machine: which ratios changed by more than their noise
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks import (
    compare,
    gpu_check,
    harness,
    kept_memory,
    ladder_report,
    llama_rungs,
    loader,
    models,
    ops,
    page,
    peers,
    planner,
    scaling,
    static,
    static_peers,
    sweeps,
    tokenizer,
    train,
    tune,
)
from benchmarks.ladder import Request, Step
from gpt.cli import UserError, parse_options, prepare_output, run_program
from gpt.hardware import pick_device, set_threads


@dataclass(frozen=True)
class Options:
    """Options of `python -m benchmarks`."""

    subject: Annotated[
        Literal[
            "ops", "train", "ladder", "tokenizer", "loader", "static", "tune", "all", "gpu-check",
            "compare", "scaling", "plan", "peers", "models", "llama",
        ],
        tyro.conf.Positional,
    ]  # fmt: skip
    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """compare: two results. models: run directories. plan: one of scaling, else the newest committed."""
    llmc: Path | None = None
    """peers: a checkout of llm.c with its train_gpt2 built."""
    json: Path | None = None
    """Write the rows here as JSON."""
    out: Path | None = None
    """all: a directory for results.json, index.html and tables.md. models: for models.md.
    ladder of llama: the runs go here, runs/ladder if None; those that are there are not taken again."""
    preset: str = "seed"
    """Preset of the training step."""
    batch_size: int | None = None
    """Windows in a training step; None takes 16, for the ladder 4, for plan the preset's."""
    model: Literal["gpt", "llama"] = "gpt"
    """ladder: whose."""
    data: Path | None = None
    """ladder: a directory of data.prepare; None takes this repository's own text, for llama runs/corpus."""
    base: Path = Path("runs/smollm2")
    """llama, ladder: a local Llama model; SmolLM2-135M is fetched there if there is none."""
    unsloth: Path | None = None
    """llama: the Python of an environment in which Unsloth is installed, to time its steps as well."""
    steps: int = 30
    """ladder of llama: optimizer steps of each run."""
    sweeps: bool = False
    """ladder of llama: also sweep batch size and rank."""
    compiled: tyro.conf.FlagCreatePairsOff[bool] = False
    """train: also time the plain model through torch.compile, where it runs in bf16."""
    no_compiled: tyro.conf.FlagCreatePairsOff[bool] = False
    """ladder, peers: leave out torch.compile, which takes a minute to compile."""
    profile: bool = False
    """train: print what each op of the optimized step costs instead."""
    rounds: int | None = None
    """None takes 9; 5 for peers, scaling and the ops and peers of all. For ladders, also in all: as many as
    begin within 36 seconds, from 3 to 9. What is taken in three parts takes so many at the least."""
    device: str = "auto"
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    only: str = ""
    """ops, tune: only those whose name contains this."""
    text: Path | None = None
    """tokenizer, loader: a .txt or .jsonl(.gz) file, or a directory of them."""
    check: bool = False
    """static: change nothing, fail when what compiles now differs from the lock file. ops: fail when a kernel
    is wrong, or slower than the committed ratios by more than the noise."""
    quick: bool = False
    """ops: one shape of each."""
    peers: bool = False
    """static: compile other libraries' kernels instead, where installed, beside ours."""
    tutorial: Path | None = None
    """static --peers: python/tutorials/06-fused-attention.py of a checkout of Triton."""
    gpu: str = "H100"
    """plan: A100, A10G, L40S, H100, B200 or MI300X."""
    gpus: int = 1
    """plan: how many."""
    dollars: float | None = None
    """plan: of an hour of one GPU."""
    tokens: float = 1e10
    """plan: of the whole training."""
    seconds: float = float("inf")
    """static: start no compilation after this many seconds; run it again for the rest. tune: the same for
    kernels, leaving the others as they ship."""


USES = {
    "json": ("ops", "train", "ladder", "tokenizer", "loader", "tune", "scaling", "peers", "llama", "all"),
    "out": ("all", "models", "ladder"),
    "base": ("llama", "ladder", "all"),
    "steps": ("ladder",),
    "unsloth": ("llama",),
    "sweeps": ("ladder",),
    "gpu": ("plan",),
    "gpus": ("plan",),
    "dollars": ("plan",),
    "tokens": ("plan",),
    "profile": ("train",),
    "batch_size": ("train", "ladder", "loader", "llama", "plan", "peers", "all"),
    "model": ("ladder",),
    "data": ("ladder", "all"),
    "compiled": ("train",),
    "no_compiled": ("ladder", "peers", "all"),
    "only": ("ops", "tune", "all"),
    "text": ("tokenizer", "loader", "all"),
    "files": ("compare", "models", "plan"),
    "preset": ("train", "ladder", "loader", "plan", "peers", "all"),
    "llmc": ("peers",),
    "check": ("static", "ops"),
    "quick": ("ops",),
    "peers": ("static",),
    "tutorial": ("static",),
    "seconds": ("static", "tune"),
    "threads": ("ops", "train", "ladder", "loader", "scaling", "peers", "llama", "all"),
}
"""Subjects that an option is for."""


KEPT = {"ops", "train", "ladder", "scaling", "peers", "llama", "all"}
"""Subjects that are measured with memory that the C library keeps."""


def refuse_ignored(options: Options) -> None:
    """Raise UserError for an option that the subject would not look at."""
    for name, subjects in USES.items():
        if getattr(options, name) != getattr(Options, name) and options.subject not in subjects:
            flag = "--" + name.replace("_", "-") if name != "files" else "a file"
            raise UserError(f"{flag} means nothing to {options.subject}, only to: {', '.join(subjects)}")


def run(options: Options) -> int:
    fewer = options.subject in ("peers", "scaling", "all")
    rounds = (5 if fewer else harness.ROUNDS) if options.rounds is None else options.rounds
    if rounds < 1 or (options.batch_size is not None and options.batch_size < 1):
        raise UserError("--rounds and --batch-size must be at least 1")
    set_threads(options.threads)
    device = pick_device(options.device)
    if options.subject == "ladder" and options.out is not None:
        raise UserError("--out means nothing to the ladder of gpt: use --json FILE")
    path = options.json if options.out is None else options.out / "results.json"
    if options.out is not None and options.json is not None:
        raise UserError("--out writes results.json there: leave out --json")
    if options.text is not None and not options.text.exists():
        raise UserError(f"--text: there is no {options.text}")
    if path is not None:
        prepare_output(path)
    if options.check and options.json is not None:
        raise UserError("--check compares and writes no rows: leave out --json")
    batch_size = options.batch_size or 16
    if options.profile:
        if options.json is not None:
            raise UserError("--profile prints a table and writes no rows: leave out --json")
        step: Step = train.Step(options.preset, "optimized", batch_size, device)
        train.report_profile(train.profile(step, device), f"{step.label}, {step.shape}")
        return 0
    swept = sweeps.Sweeps([], device, rounds)
    rows: list[harness.Row] = []
    printed: list[harness.Row] = []  # in tables of their own
    unfinished: list[harness.Row] = []  # of a ladder of which parts are still to come
    seconds: dict[str, float] = {}
    sections: dict[str, Any] = {"seconds": seconds}
    started = time.monotonic()

    def save(part: str) -> None:
        """After every part, so that an interruption costs one."""
        lately = time.monotonic() - started - sum(seconds.values())
        seconds[part] = seconds.get(part, 0.0) + lately
        if path is not None:
            results = [*swept.rows(), *rows, *printed, *unfinished]
            harness.write_results(path, device, results, **sections)

    def add_ladder(measurement: ladder_report.Measurement) -> None:
        climbed, section = measurement.finish()
        printed.extend(climbed)
        sections.setdefault("ladders", []).append(section)
        sections["ladders"].sort(key=lambda ladder: ladder["title"])

    if options.subject in ("ops", "all"):
        cases = [case for name, case in ops.cases(device, quick=options.quick) if options.only in name]
        if not cases:
            raise UserError(f"no op is called {options.only!r}; there are: {', '.join(ops.NAMES)}")
        if options.check:
            return compare.check(cases, device, rounds)
        swept = sweeps.Sweeps(cases, device, rounds)
        if options.subject == "ops":
            swept.sweep_all()
        else:
            swept.sweep()  # the others behind further parts, so that they lie minutes apart
        save("ops")
    if options.subject == "train":
        rows += train.measure(options.preset, batch_size, device, rounds, compiled=options.compiled)
    if options.subject in ("ladder", "all"):
        request = Request(
            options.preset, options.batch_size or 4, device, options.data, not options.no_compiled
        )
        parts = sweeps.SWEEPS if options.subject == "all" else 1  # which lie minutes apart, as those of ops
        gpt_ladder = ladder_report.Measurement("gpt", request, options.rounds, parts)
        unfinished = gpt_ladder.part()
        if options.subject == "ladder":
            add_ladder(gpt_ladder)
            unfinished = []
        save("ladder of gpt")
    if options.subject == "all":
        try_llama_ladder(options.base, device, options.rounds, add_ladder)
        save("ladder of llama")
        unfinished = gpt_ladder.part()
        save("ladder of gpt")
        swept.sweep()
        save("ops")
    if options.subject in ("peers", "all"):
        measured, skipped = peers.measure(
            options.preset, options.batch_size or 4, device, rounds,
            compiled=not options.no_compiled, llmc=options.llmc,
        )  # fmt: skip
        rows, sections["skipped_peers"] = rows + measured, skipped
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        save("peers")
    if options.subject == "scaling":
        printed, sections["plan"] = scaling.measure(device, rounds)
    if options.subject in ("tokenizer", "all"):
        if options.subject == "all" and options.text is None and not tokenizer.CORPORA.is_dir():
            print("skipped: tokenizer: no text here, give --text a .txt or .jsonl file")
        else:
            rows += alone(tokenizer.measure, options.text, options.rounds or harness.ROUNDS)
            save("tokenizer")
    if options.subject == "all":
        add_ladder(gpt_ladder)
        unfinished = []
        save("ladder of gpt")
    if options.subject in ("loader", "all"):
        many = options.rounds or harness.ROUNDS
        rows += alone(loader.measure_all, many, options.preset, batch_size, options.text)
        save("loader")
    if options.subject == "llama":
        from benchmarks import llama

        if options.unsloth is None:
            print("skipped: Unsloth: name the Python of an environment that has it with --unsloth")
        rows += llama.measure(fetched(options.base), batch_size, device, rounds, options.unsloth)
    swept.sweep_all()
    harness.report(f"python -m benchmarks {options.subject}", [*swept.rows(), *rows], device)
    save("ops" if options.subject == "all" else options.subject)
    if options.subject == "all":
        parts = ", ".join(f"{part} {took / 60:.1f}" for part, took in seconds.items())
        print(f"minutes: {sum(seconds.values()) / 60:.1f}; {parts}")
    if options.subject == "all" and options.out is not None:
        print(f"wrote {page.write(compare.read(options.out / 'results.json'), options.out)}")
    return 0


def alone(measure: Callable[..., list[harness.Row]], *arguments: Any) -> list[harness.Row]:
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
        return pool.submit(measure, *arguments).result()


def try_llama_ladder(
    base: Path, device: torch.device, rounds: int | None, add: Callable[[ladder_report.Measurement], None]
) -> None:
    """Says why where it cannot be measured; that it computes something wrong is an error all the same."""
    try:
        request = Request("", llama_rungs.BATCH_SIZE, device, base=fetched(base))
        add(ladder_report.Measurement("llama", request, rounds))
    except harness.WrongResult:
        raise
    except UserError as error:
        print(f"skipped: ladder of llama: {error}")


def fetched(base: Path) -> Path:
    """`base`, filled with SmolLM2-135M where there is nothing yet."""
    from llama_lora.fetch import fetch

    if (base / "config.json").is_file():
        return base
    if base.exists() and (not base.is_dir() or any(base.iterdir())):
        raise UserError(f"--base: {base} is no Llama model, which is a directory with config.json")
    return fetch(base)


def main(arguments: list[str]) -> int:
    options = parse_options(Options, arguments, prog="python -m benchmarks")
    refuse_ignored(options)
    if options.subject == "gpu-check":
        return gpu_check.run()
    if options.subject == "ladder" and options.model == "llama":
        from benchmarks import llama_ladder

        with kept_memory.given_back():  # to runs that are those of a user
            return llama_ladder.run(
                fetched(options.base), options.data or Path("runs/corpus"),
                options.out or Path("runs/ladder"), options.steps,
                sweeps=options.sweeps, json_path=options.json,
            )  # fmt: skip
    if options.subject == "models":
        return models.run(options.files, options.out)
    if options.subject == "plan":
        if len(options.files) > 1:
            raise UserError("plan takes one file of python -m benchmarks scaling")
        return planner.run(
            next(iter(options.files), None),
            options.preset,
            options.batch_size,
            options.gpu,
            options.gpus,
            options.dollars,
            options.tokens,
        )
    if options.subject == "compare":
        return compare.run(options.files)
    if options.peers and (options.check or options.seconds != Options.seconds):
        raise UserError("--peers compares all and checks nothing: leave out --check and --seconds")
    if options.subject == "static" and options.peers:
        static_peers.report(options.tutorial)
        return 0
    if options.tutorial is not None:
        raise UserError("--tutorial needs --peers")
    if options.subject == "static":
        return static.run(options.check, options.seconds)
    if options.subject == "tune":
        return tune.run(options.only, options.json, options.seconds)
    return run(options)


if __name__ == "__main__":
    if KEPT & set(sys.argv[1:]):
        kept_memory.restart()
    run_program(main)

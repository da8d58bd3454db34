"""Launch configurations measured on the GPU at hand: python -m benchmarks tune [--only KERNEL] [--json FILE]

Every configuration that the shipped shapes ask for is compared with its neighbours. Neighbours that break a
rule of `benchmarks static` (a spill, too much shared memory, no matrix instructions) are never run; of the
others, those that give the results of what ships are timed, and the fastest is taken when it gains MARGIN.
The table goes to kernels/tapelm/tuned/ARCHITECTURE.json, where the library finds it (commit it with the lock
file that `python -m benchmarks static` then writes), or to FILE, for `tapelm.use_table`.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks import static
from benchmarks.gpu_parts import usable
from benchmarks.harness import reason
from benchmarks.subjects import SUBJECTS, meta, random
from gpt.cli import UserError, write_atomically
from gpt.hardware import fingerprint
from tapelm._library import CUDA_LAUNCHERS, architecture, assumed_architecture
from tapelm._tuning import FOLDER, Choice, Config, asked, trial
from tapelm.proofs.launches import captured_launches
from tapelm.proofs.resources import TARGETS

MARGIN = 1.03
ROUNDS = 5
FINALISTS = 3
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5)}

Use = tuple[int, int]
"""Index of a subject and of one of its shipped shapes."""
Timer = Callable[[Choice, Config, Use], float]
"""Seconds of one use with a configuration; infinite where its results are not those of what ships."""


@dataclass
class Question:
    """What ships for a choice, and the shipped shapes that depend on it."""

    shipped: Config
    uses: list[Use] = field(default_factory=list)


def questions(target: str) -> dict[Choice, Question]:
    """Every choice that a launcher makes for a shipped shape on `target`."""
    found: dict[Choice, Question] = {}
    for subject, chosen in enumerate(SUBJECTS):
        for shipped, (dtype, shape) in enumerate(chosen.shipped):
            with assumed_architecture(target), captured_launches(), asked() as choices:
                CUDA_LAUNCHERS[chosen.launcher](*chosen.arguments(meta(dtype), *shape))
            for choice, config in choices.items():
                found.setdefault(choice, Question(dict(config))).uses.append((subject, shipped))
    return found


def neighbours(shipped: Config) -> list[Config]:
    """Configurations that differ in one or two parameters: sizes and warps by a factor of 2, stages by 1."""
    steps = {}
    for name, value in shipped.items():
        low, high = LIMITS.get(name, (1, 1 << 16))
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        steps[name] = [each for each in near if low <= each <= high]
    return [
        {**shipped, **dict(zip(names, values, strict=True))}
        for count in (1, 2)
        for names in itertools.combinations(shipped, count)
        for values in itertools.product(*(steps[name] for name in names))
    ]


def keeps_the_rules(task: tuple[str, Choice, Config, Sequence[Use]]) -> bool:
    """Whether every use compiles for the target without breaking a rule."""
    target, choice, config, uses = task
    static.launches.cache_clear()  # it remembers launches with other configurations
    try:
        with trial(choice, config):
            return not any(
                static.broken_rules({**static.identity(unit), **static.facts(unit)})
                for subject, shipped in uses
                for launch in range(len(static.launches(subject, shipped, target)))
                for unit in [static.Unit(subject, shipped, launch, target)]
            )
    finally:
        static.launches.cache_clear()


def fastest(
    choice: Choice, question: Question, candidates: Iterable[Config], timer: Timer
) -> tuple[Config, float]:
    """The best candidate and how many times faster than what ships it is, geometric mean over all uses."""

    def gain(config: Config, rounds: int) -> float:
        ratios = []
        for use in question.uses:
            pairs = [
                (timer(choice, question.shipped, use), timer(choice, config, use)) for _ in range(rounds)
            ]
            ratios.append(statistics.median(ships / own for ships, own in pairs))
        return math.exp(statistics.fmean(math.log(ratio) if ratio else -math.inf for ratio in ratios))

    first = sorted(candidates, key=lambda config: gain(config, 1), reverse=True)[:FINALISTS]
    measured = [(config, gain(config, ROUNDS)) for config in first]
    return max(measured, key=lambda each: each[1], default=(question.shipped, 1.0))


class OnDevice:
    """The timer of a real device: median milliseconds of repeated launches, caches flushed between them."""

    def __init__(self, device: torch.device, bench: Callable[..., Any] = triton.testing.do_bench) -> None:
        self.device, self.bench = device, bench
        self.use: Use | None = None
        self.launch: Callable[[], Any] = lambda: None
        self.expected: list[Tensor] = []
        self.right: dict[str, bool] = {}

    def __call__(self, choice: Choice, config: Config, use: Use) -> float:
        if use != self.use:
            self._prepare(use)
        with trial(choice, config):
            name = f"{choice} {config}"
            try:
                if name not in self.right:
                    self.right[name] = self._agrees()
                if self.right[name]:
                    return float(self.bench(self.launch, warmup=5, rep=20, return_mode="median")) / 1e3
            except (RuntimeError, triton.TritonError) as error:
                # One that asks for more than the GPU has, or is refused, is not taken.
                print(f"{name}: {reason(error)}")
                self.right[name] = False
                if not usable(self.device):
                    raise
        return math.inf

    def _prepare(self, use: Use) -> None:
        subject = SUBJECTS[use[0]]
        dtype, shape = subject.shipped[use[1]]
        arguments = subject.arguments(random(dtype, device=self.device), *shape)
        self.use, self.right = use, {}
        self.launch = partial(CUDA_LAUNCHERS[subject.launcher], *arguments)
        self.expected = self._results()

    def _results(self) -> list[Tensor]:
        results = self.launch()
        return (
            [results] if isinstance(results, Tensor) else [t for t in results or () if isinstance(t, Tensor)]
        )

    def _agrees(self) -> bool:
        for ours, expected in zip(self._results(), self.expected, strict=True):
            slack = 2.0**-12 if ours.dtype == torch.float32 else 2.0**-6
            error = (ours.double() - expected.double()).abs().max() if ours.numel() else 0.0
            if not error <= slack * (1e-3 + expected.double().abs().max() if ours.numel() else 1.0):
                return False
        return True


def tune(
    target: str, only: str, seconds: float, timer: Timer, clean: Callable[..., list[bool]],
    save: Callable[[dict[Choice, Config]], None],
) -> dict[Choice, Config]:  # fmt: skip
    """The entries of a table: for each choice whose kernel has `only` in its name what beats what ships.

    `save` gets them after each choice, as a later one may end the process.
    """
    started, entries = time.monotonic(), {}
    asked_for = {choice: each for choice, each in questions(target).items() if only in choice.kernel}
    if not asked_for:
        raise UserError(f"no kernel is called {only!r}")
    for choice, question in track(asked_for.items(), "tuning", console=Console(stderr=True), transient=True):
        if time.monotonic() - started > seconds:
            break
        near = neighbours(question.shipped)
        kept = [
            config
            for config, ok in zip(
                near, clean([(target, choice, c, question.uses) for c in near]), strict=True
            )
            if ok
        ]
        config, gained = fastest(choice, question, kept, timer)
        pruned = f"{len(near) - len(kept)} of {len(near)} pruned"
        print(f"{choice.kernel} {choice.key}: {pruned}, {gained:.2f}x {config}")
        if gained >= MARGIN:
            entries[choice] = config
        save(entries)
    return entries


def write_table(path: Path, target: str, entries: dict[Choice, Config], device: torch.device) -> None:
    configs: dict[str, dict[str, Config]] = {}
    for choice, config in sorted(entries.items()):
        configs.setdefault(choice.kernel, {})[choice.key] = config
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"architecture": target, "measured": fingerprint(device), "configs": configs}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def run(only: str, path: Path | None, seconds: float) -> int:
    """The command; returns the exit status."""
    if not torch.cuda.is_available():
        raise UserError("tune times kernels, and PyTorch sees no GPU here; what ships is proven by `static`")
    device = torch.device("cuda")
    target = architecture(device)
    if target not in TARGETS:
        raise UserError(f"tune compiles for {', '.join(TARGETS)}; this GPU is {target}")
    path = path or FOLDER / f"{target}.json"
    # Started before this process touches the GPU, which a forked child must not inherit.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        entries = tune(
            target, only, seconds, OnDevice(device), lambda tasks: list(pool.map(keeps_the_rules, tasks)),
            lambda found: write_table(path, target, found, device),
        )  # fmt: skip
    print(f"tune: {len(entries)} configurations beat what ships by {MARGIN - 1:.0%}; wrote {path}")
    return 0

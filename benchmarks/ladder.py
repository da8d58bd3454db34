"""What each optimization buys: the same training step with one more of them on every rung, taken in turn.

A ladder is a list of rungs, a name and a function that builds a step; any model has one that can build steps.
The rungs are timed in interleaved rounds, so that the gains of all steps multiply to the whole; a second set
of rounds takes each optimization away from the full set. Peak memory comes from a process for each rung.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import peak_memory
from benchmarks.ceilings import Ceilings
from benchmarks.elsewhere import Elsewhere
from benchmarks.harness import Row, WrongResult, interleave, make_row, relative_error
from benchmarks.kept_memory import stock_up
from benchmarks.sweeps import error_of_median

WARM_UP, WARM_UP_ELSEWHERE = 1, 4
"""Steps before the rounds, the first of which begins with another one. Where the C library treats memory by
itself, it learns during some steps what not to give back."""
POLISHES = 20


class Step(Protocol):
    """A model with its optimizer and its batches; a call is one training step on the next batch."""

    label: str
    shape: str
    dtype: torch.dtype
    """Of the matrix products, for the ceiling."""
    tokens: float
    """In one step, on average."""
    flops: float
    """Of the matrix products that one step needs."""
    losses: list[torch.Tensor]
    """Of every step taken, detached scalars."""

    def __call__(self) -> None: ...

    def evaluate(self) -> float:
        """The loss without dropout on a batch that is the same for all steps of a ladder."""
        ...


@dataclass(frozen=True)
class Rung:
    """`build` must pickle (a partial of a module's function), as peak memory is measured in another process.

    step    one more optimization than the step before it; the gains of these multiply to the whole
    branch  compared with the step before it, and left again
    memory  as branch, after the last step: bought with time
    """

    name: str
    build: Callable[[], Step]
    kind: Literal["step", "branch", "memory"] = "step"
    elsewhere: bool = False
    """In a process of its own, whose C library gives memory back: see kept_memory."""

    def make(self) -> Step:
        return Elsewhere(self.build) if self.elsewhere else self.build()


@dataclass(frozen=True)
class Ladder:
    """`removals` are the last step without one optimization each, under the name of what is missing.

    `tolerance` is the relative difference that rounding may make to the loss; `skipped` holds a line for
    every rung that this machine cannot have, with the reason; `modules` are what some of the
    rungs import when they first need it, which is not their steps' memory.
    """

    title: str
    rungs: Sequence[Rung]
    removals: Sequence[Rung] = ()
    tolerance: float = 1e-2
    skipped: Sequence[str] = ()
    modules: Sequence[str] = ()

    def full(self) -> Rung:
        return [rung for rung in self.rungs if rung.kind == "step"][-1]


@dataclass(frozen=True)
class Request:
    """What a ladder is built for. `data` is a directory of data.prepare; None takes text that is at hand."""

    preset: str
    batch_size: int
    device: torch.device
    data: Path | None = None
    compiled: bool = True
    base: Path | None = None
    """llama: the directory of the model."""


@dataclass
class Climb:
    """What a ladder's rounds gave. Losses and seconds are of each step of a rung, in order."""

    rows: list[Row]
    removed: list[Row] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    product: float = 1.0
    """Of the gains of all steps."""
    total: float = 1.0
    """First step against last, the median of the rounds' ratios."""

    def unexplained(self) -> float:
        """How far the product of the parts is from the whole, relative."""
        return abs(self.product / self.total - 1)


def climb(ladder: Ladder, device: torch.device, rounds: int | None, *, memory: bool = True) -> Climb:
    """Time all rungs, then all removals; `rounds` are those of harness.interleave.

    Raises WrongResult when a rung's loss is not the first one's.
    """
    return Ascent(ladder, device, rounds).finish(memory=memory)


class Ascent:
    """A ladder whose rounds are taken in `parts`, with other work between them; see sweeps for the reason.

    The steps of its rungs stay in memory meanwhile. Explicit `rounds` are the least in all.
    """

    def __init__(self, ladder: Ladder, device: torch.device, rounds: int | None, parts: int = 1) -> None:
        self.ladder, self.device, self.rounds = ladder, device, rounds
        self.left = parts if rounds is None else min(parts, rounds)
        self._race = _Race(ladder.title, ladder.rungs, ladder.tolerance, device, rounds, self.left)

    def part(self) -> None:
        self._race.take()
        self.left -= 1

    def so_far(self) -> Climb:
        """Of the parts that were taken, without removals and memory."""
        race = self._race
        first, before = self.ladder.rungs[0].name, self.ladder.rungs[0].name
        result = Climb([], losses=race.losses(), seconds=race.seconds)
        own = polished(race.seconds)
        for rung in self.ladder.rungs:
            row = race.row(f"ladder {self.ladder.title}", rung.name, {first: first})
            row.ratio_vs["before"] = math.exp(own[before] - own[rung.name])
            row.extra["gain_error"] = race.error(before, rung.name)
            result.rows.append(row)
            if rung.kind == "step":
                result.product *= row.ratio_vs["before"]
                result.total, before = row.ratio_vs[first], rung.name
        return result

    def finish(self, *, memory: bool = True) -> Climb:
        """Take the parts that are left, then all removals and, if asked for, peak memory."""
        while self.left:
            self.part()
        ladder, device = self.ladder, self.device
        self._race.end()
        result = self.so_far()
        if ladder.removals:
            full, title = ladder.full(), f"{ladder.title}, one removed"
            race = _Race(title, [full, *ladder.removals], ladder.tolerance, device, self.rounds)
            race.take()
            race.end()
            for rung in (full, *ladder.removals):
                result.removed.append(race.row(f"removal {ladder.title}", rung.name, {full.name: full.name}))
        if memory:
            for row, peak in zip(result.rows, peaks(ladder, device), strict=True):
                row.extra["peak_memory_bytes"] = peak
        return result


def polished(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The part of each rung in the logarithms of its seconds, when each round has a part of its own, too.

    By median polish (Tukey 1977, Exploratory Data Analysis, chapter 11): what slows a whole round or one step
    of it moves no difference of two rungs, and the gains of the steps multiply to that of the last over the
    first, which medians of ratios do not when there are few rounds.
    """
    logs = np.log(np.array([*seconds.values()]))
    rounds = np.zeros(logs.shape[1])
    for _ in range(POLISHES):
        own = np.median(logs - rounds, axis=1)
        rounds = np.median(logs - own[:, None], axis=0)
    return dict(zip(seconds, own.tolist(), strict=True))


def late_loss(losses: Mapping[str, Sequence[float]], name: str, rounds: int) -> float:
    """Mean over the last `rounds` of the steps that all rungs took: short ones take more of them."""
    steps = min(map(len, losses.values()))
    return statistics.fmean(losses[name][max(0, steps - rounds) : steps])


@dataclass(frozen=True)
class _Trait:
    """What is left of a step when its rounds are over."""

    shape: str
    dtype: torch.dtype
    tokens: float
    flops: float


class _Race:
    """Steps that take turns, one of `parts` of the rounds at a time; rows can be had when they are gone."""

    def __init__(
        self, title: str, rungs: Sequence[Rung], tolerance: float, device: torch.device,
        rounds: int | None, parts: int = 1,
    ) -> None:  # fmt: skip
        self.device, self.rounds, self.parts = device, rounds, parts
        self.steps: dict[str, Step] = {}
        expected = math.nan
        for rung in track(rungs, description=title, console=Console(stderr=True), transient=True):
            step = rung.make()
            loss = step.evaluate()
            expected = loss if not self.steps else expected
            if not abs(loss - expected) <= tolerance * abs(expected):
                raise WrongResult(
                    f"{title}, {rung.name}: loss {loss} of the initial weights where {rungs[0].name} has "
                    f"{expected}, nothing was timed"
                )
            for _ in range(WARM_UP_ELSEWHERE if rung.elsewhere else WARM_UP):
                step()
            self.steps[rung.name] = step
        self.traits = {
            name: _Trait(step.shape, step.dtype, step.tokens, step.flops) for name, step in self.steps.items()
        }
        self.ceilings = Ceilings(device, [step.dtype for step in self.steps.values()], ["gemm"])
        self.generator = random.Random(0)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.steps}
        self._losses: dict[str, list[float]] = {}
        self.ends = [0]
        """How many rounds had been taken at the end of each part."""

    def take(self) -> None:
        stock_up()
        taken = interleave(self.steps, self.ceilings, self.rounds, generator=self.generator, parts=self.parts)
        for name, times in taken.items():
            self.seconds[name] += times
        self.ends.append(len(self.seconds[name]))

    def losses(self) -> dict[str, list[float]]:
        if self.steps:
            return {name: [float(loss) for loss in step.losses] for name, step in self.steps.items()}
        return self._losses

    def end(self) -> None:
        self._losses = self.losses()
        self.steps.clear()
        gc.collect()

    def error(self, base: str, name: str) -> float:
        """Standard error of the median ratio, relative: that of all rounds, or that by the parts' range."""
        ratios = [a / b for a, b in zip(self.seconds[base], self.seconds[name], strict=True)]
        parts = [statistics.median(ratios[begin:end]) for begin, end in itertools.pairwise(self.ends)]
        return max(relative_error(ratios), error_of_median(parts))

    def row(self, subject: str, name: str, against: Mapping[str, str]) -> Row:
        """`against` has the steps to compare with under the names of their ratios, the first one's error
        being that of the row."""
        trait, seconds = self.traits[name], self.seconds[name]
        others = {label: self.seconds[other] for label, other in against.items()}
        limit = self.ceilings.gemm(trait.dtype)
        row = make_row(
            subject, name, trait.shape, trait.dtype, self.device, seconds, limit, trait.flops, against=others
        )
        row.extra["ratio_error"] = self.error(next(iter(against.values())), name)
        row.extra["tokens_per_second"] = trait.tokens / statistics.median(seconds)
        row.extra["loss"] = late_loss(self.losses(), name, len(seconds))
        return row


def peaks(ladder: Ladder, device: torch.device) -> list[float]:
    """Bytes that a step of each rung needs at its peak."""
    rungs = ladder.rungs
    return peak_memory.measure(
        [rung.build for rung in rungs], [rung.elsewhere for rung in rungs], ladder.modules, device
    )


def sections(ladder: Ladder, result: Climb) -> dict[str, Any]:
    """What the JSON of a ladder holds beside its rows."""
    return {
        "title": ladder.title,
        "losses": result.losses,
        "step_seconds": result.seconds,
        "product_of_steps": result.product,
        "total": result.total,
        "skipped": list(ladder.skipped),
    }

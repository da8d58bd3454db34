"""Many cases, each measured several times with all the others in between.

On a shared machine what neighbours take of caches and memory changes within minutes, and with it the ratio of
two variants that need them differently: rounds that follow one another agree, and those of the next minute do
not. So the rounds of a case are spread over sweeps through all cases; how far the sweeps lie apart is in the
error of a ratio. Tensors are made anew in every sweep, results compared in the first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.ceilings import Ceilings, Limit
from benchmarks.harness import (
    MOST_SECONDS,
    ROUNDS,
    Case,
    Row,
    Seconds,
    calls_in_a_round,
    check,
    is_usable,
    make_row,
    relative_error,
    take,
)
from gpt.hardware import device_name

SWEEPS = 3


@dataclass
class _Taken:
    """What is left of a case between sweeps: no tensors."""

    subject: str
    shape: str
    dtype: torch.dtype
    work: float
    calls: dict[str, int]
    seconds: list[Seconds] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)

    def rows(self, device: torch.device) -> list[Row]:
        baseline = next(iter(self.seconds[0]))
        joined = {name: [s for each in self.seconds for s in each[name]] for name in self.seconds[0]}
        limit = statistics.median_low(self.limits)
        rows = []
        for name, own in joined.items():
            row = make_row(
                self.subject, name, self.shape, self.dtype, device, own, limit, self.work,
                against={baseline: joined[baseline]},
            )  # fmt: skip
            if len(self.seconds) > 1 and name != baseline:
                sweeps = [statistics.median(ratios(each, baseline, name)) for each in self.seconds]
                row.extra["ratio_error"] = max(row.extra["ratio_error"], relative_error(sweeps))
            rows.append(row)
        return rows


def ratios(seconds: Seconds, baseline: str, name: str) -> list[float]:
    """Of every round."""
    return [base / own for base, own in zip(seconds[baseline], seconds[name], strict=True)]


class Sweeps:
    """Cases in SWEEPS sweeps with `rounds` rounds in all; fewer sweeps for fewer rounds.

    A case is built only when its turn comes, so that memory holds one at a time. Those that are not usable on
    the device are left out with a word.
    """

    def __init__(self, builds: Sequence[Callable[[], Case]], device: torch.device, rounds: int) -> None:
        self.builds, self.device = builds, device
        self.count = self.left = min(SWEEPS, rounds)
        self.rounds = math.ceil(rounds / self.count)
        self._taken: dict[int, _Taken] = {}
        self._ceilings: dict[tuple[str, torch.dtype | None], Ceilings] = {}

    def sweep(self) -> None:
        """Measure every case once more, unless it has been SWEEPS times."""
        if self.left == 0:
            return
        self.left -= 1
        skipped, console = 0, Console(stderr=True)
        for index, build in enumerate(
            track(self.builds, description="measuring", console=console, transient=True)
        ):
            case = build()
            if is_usable(case, self.device):
                self._measure(index, case)
            else:
                skipped += 1
        if skipped and self.left == 0:
            name = device_name(self.device)
            print(f"skipped: {skipped} cases of matrix products in bfloat16, which {name} has not")

    def sweep_all(self) -> None:
        while self.left:
            self.sweep()

    def _measure(self, index: int, case: Case) -> None:
        limit = case.bound, case.dtype if case.bound == "gemm" else None
        if limit not in self._ceilings:
            self._ceilings[limit] = Ceilings(self.device, [case.dtype], [case.bound])
        if index in self._taken:
            for run in case.variants.values():
                run()
        else:
            check(case)
            calls = calls_in_a_round(case, self.device)
            self._taken[index] = _Taken(case.subject, case.shape, case.dtype, case.work, calls)
        taken, most_seconds = self._taken[index], MOST_SECONDS / self.count
        seconds, ceiling = take(
            case, self.device, self.rounds, self._ceilings[limit], taken.calls, most_seconds
        )
        taken.seconds.append(seconds)
        taken.limits.append(ceiling)

    def rows(self) -> list[Row]:
        """Of what was measured so far."""
        return [row for _, taken in sorted(self._taken.items()) for row in taken.rows(self.device)]


def measure_all(
    builds: Sequence[Callable[[], Case]], device: torch.device, rounds: int = ROUNDS
) -> list[Row]:
    """Rows of all usable cases, their sweeps one after another."""
    sweeps = Sweeps(builds, device, rounds)
    sweeps.sweep_all()
    return sweeps.rows()

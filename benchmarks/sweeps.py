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
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.ceilings import Ceilings, Limit
from benchmarks.harness import (
    LEAST_ROUNDS,
    MOST_SECONDS,
    ROUNDS,
    SETTLED,
    Case,
    Row,
    Seconds,
    WrongResult,
    calls_in_a_round,
    check,
    is_ours,
    is_usable,
    make_row,
    take,
)
from benchmarks.kept_memory import stock_up
from gpt.hardware import device_name

SWEEPS = 3


@dataclass
class _Taken:
    """What is left of a case between sweeps: no tensors."""

    subject: str
    shape: str
    dtype: torch.dtype
    work: float
    variants: list[str]
    calls: dict[str, int] = field(default_factory=dict)
    """In a round; the same in every sweep."""
    seconds: list[Seconds] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)

    def rows(self, device: torch.device) -> list[Row]:
        """Every sweep counts alike, however many rounds it took."""
        each = [self._of_sweep(device, *sweep) for sweep in zip(self.seconds, self.limits, strict=True)]
        return [self._joined(rows) for rows in zip(*each, strict=True)]

    def _of_sweep(self, device: torch.device, seconds: Seconds, limit: Limit) -> list[Row]:
        baseline = next(iter(seconds))
        against = {baseline: seconds[baseline]}
        return [
            make_row(
                self.subject, name, self.shape, self.dtype, device, own, limit, self.work, against=against
            )
            for name, own in seconds.items()
        ]

    def _joined(self, rows: Sequence[Row]) -> Row:
        """Of one variant in every sweep: medians, and the ceiling of the sweep with the middle fraction."""
        baseline = next(iter(rows[0].ratio_vs))
        ratios = [row.ratio_vs[baseline] for row in rows]
        middle = sorted(rows, key=lambda row: row.fraction_of_ceiling)[len(rows) // 2]
        errors = [
            row.extra["ratio_error"] / math.sqrt(len(rows))
            for row, seconds in zip(rows, self.seconds, strict=True)
            if len(rows) == 1
            or len(seconds[row.variant]) >= LEAST_ROUNDS  # fewer tell nothing but their ratio
        ]
        return replace(
            middle,
            median_ms=statistics.median(row.median_ms for row in rows),
            fastest_ms=min(row.fastest_ms for row in rows),
            slowest_ms=max(row.slowest_ms for row in rows),
            ratio_vs={baseline: statistics.median(ratios)},
            fraction_of_ceiling=statistics.median(row.fraction_of_ceiling for row in rows),
            extra={
                # Three ratios alone now and then agree by chance.
                "ratio_error": max([*errors, error_of_median(ratios), SETTLED if len(rows) > 1 else 0.0]),
                "sweeps": len(rows),
            },
        )


def error_of_median(values: Sequence[float]) -> float:
    """Standard error of the median of one to three values over that median, by their range.

    A range of so many normal values is 1.128 and 1.693 standard deviations at the mean.
    """
    if len(values) == 1:
        return 0.0
    deviation = (max(values) - min(values)) / {2: 1.128, 3: 1.693}[len(values)]
    return 1.2533 * deviation / math.sqrt(len(values)) / statistics.median(values)


class Sweeps:
    """Cases in SWEEPS sweeps with at least `rounds` rounds in all; fewer sweeps for fewer rounds.

    A case is built only when its turn comes, so that memory holds one at a time. Those that are not usable on
    the device are left out with a word.
    """

    def __init__(self, builds: Sequence[Callable[[], Case]], device: torch.device, rounds: int) -> None:
        self.builds, self.device = builds, device
        self.count = self.left = min(SWEEPS, rounds)
        self.rounds = math.ceil(rounds / self.count)
        self._taken: dict[int, _Taken] = {}
        self.errors: list[dict[str, str]] = []
        """Subject, shape, dtype, variant and error of what did not run."""

    def sweep(self) -> None:
        """Measure every case once more, unless that was done `count` times."""
        if self.left == 0:
            return
        self.left -= 1
        stock_up()  # what other work has taken meanwhile is gone from the stock
        skipped, console = 0, Console(stderr=True)
        ceilings: dict[tuple[str, torch.dtype | None], Ceilings] = {}
        for index, build in enumerate(
            track(self.builds, description="measuring", console=console, transient=True)
        ):
            case = build()
            if is_usable(case, self.device):
                limit = case.bound, case.dtype if case.bound == "gemm" else None
                if limit not in ceilings:
                    ceilings[limit] = Ceilings(self.device, [case.dtype], [case.bound])
                self._measure(index, case, ceilings[limit])
            else:
                skipped += 1
        if skipped and self.left == 0:
            name = device_name(self.device)
            print(f"skipped: {skipped} cases of matrix products in bfloat16, which {name} has not")

    def sweep_all(self) -> None:
        while self.left:
            self.sweep()

    def _measure(self, index: int, case: Case, ceilings: Ceilings) -> None:
        if index not in self._taken:
            case, errors = check(case)
            for name, error in errors.items():
                said = {"subject": case.subject, "shape": case.shape, "dtype": str(case.dtype)}
                self.errors.append({**said, "variant": name, "error": error})
                print(f"{case.subject} {case.shape} {case.dtype}, {name}: {error}")
            self._taken[index] = _Taken(case.subject, case.shape, case.dtype, case.work, [*case.variants])
        taken, most_seconds = self._taken[index], MOST_SECONDS / self.count
        if not taken.variants:
            return
        case = replace(case, variants={name: case.variants[name] for name in taken.variants})
        warm_up = partial(self._warm_up, case, taken)
        seconds, limit = take(case, self.rounds, ceilings, warm_up, most_seconds, turn=len(taken.seconds))
        taken.seconds.append(seconds)
        taken.limits.append(limit)

    def _warm_up(self, case: Case, taken: _Taken) -> dict[str, int]:
        if taken.calls:
            for run in case.variants.values():
                run()
        else:
            taken.calls = calls_in_a_round(case, self.device)
        return taken.calls

    def rows(self) -> list[Row]:
        """Of what was measured so far."""
        return [row for _, taken in sorted(self._taken.items()) for row in taken.rows(self.device)]

    def failed(self) -> list[str]:
        """What of ours did not run; a peer's error leaves the peer out."""
        return [
            f"{each['subject']} {each['shape']}, {each['variant']}: {each['error']}"
            for each in self.errors
            if is_ours(each["variant"])
        ]


def measure_all(
    builds: Sequence[Callable[[], Case]], device: torch.device, rounds: int = ROUNDS
) -> list[Row]:
    """Rows of all usable cases, their sweeps one after another. Raises WrongResult where ours did not run."""
    sweeps = Sweeps(builds, device, rounds)
    sweeps.sweep_all()
    if failed := sweeps.failed():
        raise WrongResult("; ".join(failed))
    return sweeps.rows()

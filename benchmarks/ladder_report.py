"""python -m benchmarks ladder --model NAME: climbs the ladder of a model and prints it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import gpt_ladder, harness, llama_rungs
from benchmarks.harness import Row
from benchmarks.ladder import Ascent, Climb, Ladder, Request, sections
from benchmarks.train import Profile, profile, report_profile

LADDERS: dict[str, Callable[[Request, Path], Ladder]] = {"gpt": gpt_ladder.build, "llama": llama_rungs.build}
"""By model: (request, a folder that is removed afterwards) -> its ladder."""
UNEXPLAINED, ACCOUNTED = 0.10, 0.95


class Measurement:
    """A model's ladder whose rounds are taken in `parts`, with other work between them."""

    def __init__(self, model: str, request: Request, rounds: int | None, parts: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._ladder = LADDERS[model](request, Path(self._folder.name))
        self._ascent = Ascent(self._ladder, request.device, rounds, parts)

    def part(self) -> list[Row]:
        """Take one more part; rows of all that were taken."""
        self._ascent.part()
        return self._ascent.so_far().rows

    def finish(self) -> tuple[list[Row], dict[str, Any]]:
        """Rows of the ladder, its removals among them, and the section of the JSON that goes with them."""
        with self._folder:
            result = self._ascent.finish()
            found = profile(self._ladder.full().build(), self._ascent.device)
        report(self._ladder, result, found)
        return [*result.rows, *result.removed], sections(self._ladder, result) | {
            "profile": {"step_ms": found.step_ms, "accounted": found.accounted(), "ops": found.ops}
        }


def report(ladder: Ladder, result: Climb, found: Profile) -> None:
    """Both tables, whether the parts explain the whole, and the profile of the full set."""
    console = Console(width=None if Console().is_terminal else 150)
    console.print(_table(f"ladder {ladder.title}: one more on every line", result.rows, "before"))
    if result.removed:
        full = ladder.full().name
        console.print(_table(f"{ladder.title}: all of them, and all but one", result.removed, full))
    for line in ladder.skipped:
        console.print(f"skipped: {line}", highlight=False)
    for row in harness.impossible([*result.rows, *result.removed]):
        console.print(
            f"! {row.variant}: {100 * row.fraction_of_ceiling:.0f}% of the ceiling", highlight=False
        )
    console.print(
        f"the gains of the steps multiply to {result.product:.2f}x, first to last is {result.total:.2f}x: "
        f"{100 * result.unexplained():.1f}% apart" + _verdict(result.unexplained() > UNEXPLAINED),
        highlight=False,
    )
    report_profile(found, f"{ladder.title}, {ladder.full().name}", shown=12)
    if found.accounted() < ACCOUNTED:
        console.print(f"the profile misses its {100 * ACCOUNTED:.0f}%", highlight=False)


def _verdict(missed: bool) -> str:
    return f"; more than {100 * UNEXPLAINED:.0f}%, the machine was too busy: run it again" if missed else ""


def _table(title: str, rows: list[Row], against: str) -> Table:
    """A line per rung; `against` is the ratio shown beside that to the first line."""
    table = Table(title=title)
    first = next(iter(rows[0].ratio_vs))
    removal = against == first
    head = ["", "median ms", "min-max", "tokens/s", "MFU", "slower" if removal else "gain", "error"]
    for name in (*head, *([] if removal else ["speed-up", "peak memory"]), "loss"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        ratio = row.ratio_vs[against]
        cells = [
            row.variant,
            f"{row.median_ms:.1f}",
            f"{row.fastest_ms:.0f}-{row.slowest_ms:.0f}",
            f"{row.extra['tokens_per_second']:,.0f}",
            f"{row.fraction_of_ceiling:.0%}",
            f"{1 / ratio if removal else ratio:.3f}x",
            f"{row.extra['ratio_error' if removal else 'gain_error']:.1%}",
        ]
        if not removal:
            peak = row.extra.get("peak_memory_bytes")
            cells += [f"{row.ratio_vs[first]:.2f}x", "" if peak is None else f"{peak / 1e6:,.0f} MB"]
        table.add_row(*cells, f"{row.extra['loss']:.4f}")
    return table

"""Two results of one machine beside each other, and a run held against the committed ones.

Only ratios to a baseline of the same run are compared, never times: a shared machine drifts. A ratio may fall
by four standard errors of the two, and by a tenth in any case, before it counts as slower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Case, Row, WrongResult, is_usable, measure
from benchmarks.kept_memory import stock_up
from gpt.cli import UserError
from gpt.hardware import fingerprint

RESULTS = Path(__file__).parent / "results"
MACHINE = ("device", "threads", "cpu_model", "cpu_capability", "bf16", "glibc_tunables")
KIND = ("threads", "cpu_capability", "bf16", "glibc_tunables")
"""What two machines must share for their ratios to be alike within OTHER_CPU."""
LEAST, OTHER_CPU, MOST = 0.10, 0.30, 0.50
NOISY = 0.30
ERRORS = 4.0
UNKNOWN_ERROR = 0.02
"""Relative, of rows that were written without one."""
ATTEMPTS = 3

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Results:
    """A JSON file of the benchmarks."""

    path: Path
    machine: dict[str, Any]
    rows: list[Row]
    content: dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One row of both: speed relative to its baseline before and now, and the fall that noise allows."""

    key: Key
    before: float
    now: float
    allowed: float

    @property
    def change(self) -> float:
        return self.now / self.before - 1

    @property
    def slower(self) -> bool:
        return self.change < -self.allowed

    @property
    def verdict(self) -> str:
        if self.slower:
            return "SLOWER"
        if self.change > self.allowed:
            return "faster"
        return "too noisy" if self.noisy else ""

    @property
    def noisy(self) -> bool:
        """Whether more than 30% could be lost unseen."""
        return self.allowed > NOISY


def read(path: Path, subject: str = "ops") -> Results:
    """Raises UserError for a file that is not a result of these benchmarks, as `subject` writes it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Results(path, content["machine"], [Row(**row) for row in content["rows"]], content)
    except FileNotFoundError as error:
        raise UserError(
            f"there is no {path}: write it with python -m benchmarks {subject} --json {path}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of python -m benchmarks --json: {error!r}") from error


def refuse_other_machine(a: Results, b: Results) -> None:
    """Raise UserError naming what differs."""
    apart = [
        f"{name} {a.machine.get(name)!r} and {b.machine.get(name)!r}"
        for name in MACHINE
        if a.machine.get(name) != b.machine.get(name)
    ]
    if apart:
        raise UserError(f"{a.path} and {b.path} come from different machines: {'; '.join(apart)}")


def key_of(row: Row) -> Key:
    return row.subject, row.shape, row.dtype, row.variant


def changes(before: Iterable[Row], now: Iterable[Row], least: float = LEAST) -> list[Change]:
    """Of the rows that both have, the baselines left out."""
    known = {key_of(row): row for row in before}
    found = []
    for row in now:
        old = known.get(key_of(row))
        against = next(iter(row.ratio_vs))
        if old is None or against == row.variant or against not in old.ratio_vs:
            continue
        errors = [each.extra.get("ratio_error", UNKNOWN_ERROR) for each in (old, row)]
        allowed = min(MOST, max(least, ERRORS * math.hypot(*errors)))
        found.append(Change(key_of(row), old.ratio_vs[against], row.ratio_vs[against], allowed))
    return found


def run(before: Path, now: Path) -> int:
    """`benchmarks compare A.json B.json`: prints the changes; 1 when something became slower."""
    a, b = read(before), read(now)
    refuse_other_machine(a, b)
    found = changes(a.rows, b.rows)
    if not found:
        raise UserError(f"{a.path} and {b.path} have no row in common: write both with the same command")
    report(f"{a.path.name} and {b.path.name}", found)
    for mine, other in ((a, b), (b, a)):
        if only := {key_of(row) for row in mine.rows} - {key_of(row) for row in other.rows}:
            print(f"only in {mine.path}: {len(only)} rows")
    return int(any(change.slower for change in found))


def report(title: str, found: Sequence[Change]) -> None:
    table = Table(title=title)
    for column in ("op", "shape", "dtype", "variant", "before", "now", "change", "noise", "verdict"):
        table.add_column(
            column, justify="right" if column in ("before", "now", "change", "noise") else "left"
        )
    for change in found:
        table.add_row(
            *change.key, f"{change.before:.2f}x", f"{change.now:.2f}x", f"{100 * change.change:+.0f}%",
            f"{100 * change.allowed:.0f}%", change.verdict,
        )  # fmt: skip
    Console(width=None if Console().is_terminal else 150).print(table)


def _has_rows(path: Path) -> bool:
    """Whether a committed file has rows of this contract; lock files and others have their own."""
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    return isinstance(rows, list) and bool(rows) and all("ratio_vs" in row for row in rows)


def committed(machine: dict[str, Any], folder: Path = RESULTS) -> tuple[list[Row], float]:
    """Rows of the committed results that hold for `machine`, and the least fall that counts.

    Raises UserError when there are none: ratios of another kind of machine would mean nothing here.
    """
    files = [read(path) for path in sorted(folder.glob("*.json")) if _has_rows(path)]
    same = [each for each in files if all(each.machine.get(n) == machine.get(n) for n in MACHINE)]
    alike = [each for each in files if all(each.machine.get(n) == machine.get(n) for n in KIND)]
    chosen = same or alike
    if not chosen:
        kind = ", ".join(f"{name} {machine.get(name)}" for name in KIND)
        raise UserError(
            f"no results of a machine like this one ({kind}) are committed in {folder}: "
            "write them with --json FILE in place of --check"
        )
    rows: dict[Key, Row] = {}
    for each in sorted(chosen, key=lambda each: each.machine["date"]):
        rows |= {key_of(row): row for row in each.rows}
    return list(rows.values()), LEAST if same else OTHER_CPU


def check(
    builds: Sequence[Callable[[], Case]],
    device: torch.device,
    rounds: int,
    known: tuple[list[Row], float] | None = None,
) -> int:
    """Measure the cases and hold them against what is committed; 1 when a kernel is wrong or slower.

    What looks slower or is noisy is measured up to twice again, so that one disturbance is no finding.
    """
    stock_up()
    rows, least = known or committed(fingerprint(device))
    found, wrong, new = [], [], []
    for build in builds:
        case = build()
        if not is_usable(case, device):
            new.append(f"{case.subject} {case.shape}")
            continue
        try:
            kept = _best(build, device, rounds, rows, least)
        except WrongResult as error:
            wrong.append(" ".join(str(error).split()))
            continue
        if not kept:
            new.append(f"{case.subject} {case.shape}")
        found += kept
    if found:
        report("against the committed ratios", found)
    for line in wrong:
        print(f"WRONG: {line}")
    if new:
        print(f"not committed, not compared: {', '.join(new)}")
    slower = [change for change in found if change.slower]
    noisy = sum(change.verdict == "too noisy" for change in found)
    print(
        f"{len(found)} ratios compared: {len(wrong)} cases wrong, {len(slower)} ratios slower, "
        f"{noisy} too noisy to tell"
    )
    if not found and not wrong:
        raise UserError("nothing measured here is committed: write it with --json FILE in place of --check")
    return int(bool(wrong or slower))


def _best(
    build: Callable[[], Case], device: torch.device, rounds: int, rows: list[Row], least: float
) -> list[Change]:
    """The changes of a case, for each row that of the attempt which was not slower, with the least noise.

    Each attempt has a case of its own: behind one, optimizers have taken different numbers of steps.
    """
    best: dict[Key, Change] = {}
    for _ in range(ATTEMPTS):
        for change in changes(rows, measure(build(), device, rounds), least):
            kept = best.get(change.key)
            if kept is None or (change.slower, change.allowed) < (kept.slower, kept.allowed):
                best[change.key] = change
        if not any(change.slower or change.noisy for change in best.values()):
            break
    return list(best.values())

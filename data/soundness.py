"""Rows that can be told: what is no price, comes twice, or breaks a series is counted and named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from itertools import groupby, pairwise
from types import MappingProxyType

from data.problems import Problems
from data.series import MAIN_FIELDS, SPARSE, Row, Series, spacing_of, unit_of

# Ratios of a split of shares, and how far the market may move on its day.
SPLIT_RATIOS = (1.5, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 50)
SPLIT_TOLERANCE = 0.08
LIKELY_SPLIT, MISSING = "likely split", "missing days"
LATE = timedelta(days=31)
LATE_ROW = "released a month or more after the row behind it, which counts as released no earlier"
EARLY = (
    "the rows are a month or more apart and count as released on their dates, as they have no available_at: "
    "a figure of a month that is published in the next one would be known too early"
)
LARGE_JUMP = 1.9  # a split of two for one, on a day when the market moved by 5% against it
JUMP = (
    "the price nearly doubles or halves from one row to the next and is kept: a crash, a slip or a split? "
    '(where a column unit says "dollars a share", the series begins anew at splits)'
)


def sound_series(
    rows: Iterable[Row],
    problems: Problems,
    *,
    splits: Mapping[tuple[str, date], bool] = MappingProxyType({}),
) -> Iterator[Series]:
    """The rows of every entity, in order of its name, as one or more series without breaks.

    A row is left out when it is not a number, no positive price, released before its day, or a second value
    for a day, of which the one released first stays. A series ends and another begins where rows are missing
    (see SPACINGS) or the price jumps as it does in a split, so that no change is computed across. All are
    counted in `problems`, and DataError is raised if it is strict.
    splits: (entity, day) of jumps that are known to be splits (True) or not to be (False): not counted.
    """
    ordered = sorted(rows, key=lambda row: row.entity)
    for _, group in groupby(ordered, key=lambda row: row.entity):
        kept = list(_sound_rows(group, problems))
        main = sorted((row for row in kept if row.field in MAIN_FIELDS), key=lambda row: row.date)
        if not main:
            continue
        starts, spacing = [main[0].date], spacing_of([row.date.toordinal() for row in main])
        if spacing.name in SPARSE and main[0].place and all(row.available_at == row.date for row in main):
            problems.note(EARLY, place_of(main[0]))
        for before, after in pairwise(main):
            if before.available_at - after.available_at >= LATE:
                problems.note(LATE_ROW, place_of(before))
            kind = _break(before, after, spacing.longest)
            known = splits.get((after.entity, after.date))
            if known is not None and kind in (None, LIKELY_SPLIT):
                starts += [after.date] if known else []
            elif kind is None:
                _note_jump(before, after, problems)
            else:
                if after.place or kind != MISSING:  # rows of the packages are fixed, and their gaps known
                    problems.skip(kind, place_of(after), "the series begins anew there")
                starts.append(after.date)
        for start, end in pairwise([*starts, None]):
            assert start is not None
            yield Series([row for row in kept if start <= row.date and (end is None or row.date < end)])


def place_of(row: Row) -> str:
    """File and line of a row or, where it has none, entity and day."""
    return row.place or f"{row.entity}, {row.field} on {row.date}"


def _sound_rows(rows: Iterable[Row], problems: Problems) -> Iterator[Row]:
    seen = set()
    for row in sorted(rows, key=lambda row: (row.field, row.date, row.available_at)):
        priced = unit_of(row.unit).change == "percent"
        if not math.isfinite(row.value):
            problems.skip("not a number", place_of(row))
        elif priced and (row.value < 0 or (row.value == 0 and row.field != "volume")):
            problems.skip("not a positive price", place_of(row))
        elif row.available_at < row.date:
            problems.skip("released before its day", place_of(row))
        elif (row.field, row.date) in seen:
            problems.skip("second value for a day", place_of(row))
        else:
            seen.add((row.field, row.date))
            yield row


def _break(before: Row, after: Row, longest: timedelta) -> str | None:
    """Why no change may be computed between two rows that follow each other, or None."""
    if before.unit != after.unit:
        return "another unit"
    if after.date - before.date > longest:
        return MISSING
    if unit_of(after.unit).splits:
        jump = abs(math.log(after.value / before.value))
        if any(abs(jump - math.log(ratio)) < SPLIT_TOLERANCE for ratio in SPLIT_RATIOS):
            return LIKELY_SPLIT
    return None


def _note_jump(before: Row, after: Row, problems: Problems) -> None:
    """Note a change of the user's prices that no series is ended for: crashes look like slips and splits.

    Rows without a place are those of the packages, which are fixed, and whose crashes are known.
    """
    if not after.place or unit_of(after.unit).change != "percent":
        return
    if abs(math.log(after.value / before.value)) > math.log(LARGE_JUMP):
        problems.note(JUMP, after.place)

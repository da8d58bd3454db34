"""The tape: rows of numbers told as short dated notes, using nothing that was released after the note.

A row is (date, available_at, entity, field, value, unit). A note for day d sees the rows with available_at
up to d and no other: altering later rows leaves every earlier note as it was. Notes fall on calendar days
(Fridays, ends of months, release days), never on "the last trading day of the week", which is known only
afterwards. A hash of entity and day chooses among wordings, so two runs give the same bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from calendar import monthrange
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta
from types import MappingProxyType
from typing import Literal

from data.documents import Document
from data.problems import Problems
from data.series import Row
from data.soundness import sound_series
from data.wording import figure_note, month_note, week_note, wrap_note

Rhythm = Literal["week", "month", "release"]
# Rows of history a daily note needs: twenty daily changes for the volatility, and the row they start from.
HISTORY = 21


def write_notes(
    rows: Iterable[Row],
    problems: Problems,
    *,
    source: str,
    rhythm: Rhythm,
    splits: Mapping[tuple[str, date], bool] = MappingProxyType({}),
) -> Iterator[Document]:
    """Notes on each entity, in order of its name and then of time.

    rhythm: "week" (Fridays) and "month" (last days of months) suit daily rows and need 21 rows of history;
    "release" writes one note per row of a monthly series and needs 12. A period with no new row has no note.
    Bad rows and breaks are counted in `problems`; splits: known ones, see sound_series.
    """
    for series in sound_series(rows, problems, splits=splits):
        if rhythm == "release":
            for last in range(12, len(series.rows)):
                text = figure_note(series, last)
                yield Document(
                    text=text, source=source, date=series.dates[last], available_at=series.released[last]
                )
            continue
        seen = -1
        for day in _calendar(series.released[0], series.released[-1], rhythm):
            last = bisect_right(series.released, day) - 1
            first, seen = seen + 1, last
            if last < first or last < HISTORY:
                continue
            text = (week_note if rhythm == "week" else month_note)(series, max(first, 1), last, day)
            yield Document(text=text, source=source, date=series.dates[last], available_at=day)


def write_wrap(rows: Iterable[Row], problems: Problems, *, source: str, group: str) -> Iterator[Document]:
    """A Friday note that ranks all entities (daily prices) by their week, e.g. group="large US stocks"."""
    members = list(sound_series(rows, problems))
    start = min(series.released[0] for series in members)
    end = max(series.released[-1] for series in members)
    for day in _calendar(start, end, "week"):
        moves: list[tuple[float, float, str]] = []
        newest = date.min
        for series in members:
            last = bisect_right(series.released, day) - 1
            base = bisect_right(series.released, day - timedelta(days=7)) - 1
            if last > base >= 0 and last >= 20:
                moves.append((series.change(last, last - base), series.change(last, 20), series.entity))
                newest = max(newest, series.dates[last])
        if len(moves) >= 4:
            text = wrap_note(sorted(moves, key=lambda move: (-move[0], move[2])), group, day)
            yield Document(text=text, source=source, date=newest, available_at=day)


def _calendar(start: date, end: date, rhythm: Rhythm) -> Iterator[date]:
    """Fridays or last days of months from the first on or after start to the first on or after end."""
    day = start
    while True:
        if rhythm == "week":
            day += timedelta(days=(4 - day.weekday()) % 7)
        else:
            day = day.replace(day=monthrange(day.year, day.month)[1])
        yield day
        if day >= end:
            return
        day += timedelta(days=1)

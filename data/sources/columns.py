"""Which column holds what: the names asked for, and the days that stand under another name."""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_tz
from typing import Any

from data.config import NO_COLUMN, Config
from data.documents import DataError
from data.problems import Problems

HEAD_ROWS = 100
MOSTLY = 0.9  # of the first rows
YEARS = range(1700, 2200)  # of eight digits that count as a day
OTHER_DAY = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?!\d)")  # as in 31.01.2015
Head = Sequence[Mapping[str, Any]]  # the first rows of a table


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that hold text and date; of several the first that a row has.

    `available_at` (release date), `source` (domain) and `id` are used too where a file has them. undated: a
    table without a date is what the user wants.
    """

    text: tuple[str, ...] = ("text",)
    date: tuple[str, ...] = ("date",)
    undated: bool = False

    @classmethod
    def of(cls, config: Config) -> Columns:
        undated = NO_COLUMN in config.date_column or config.split == "hash"
        return cls(config.text_column, tuple(n for n in config.date_column if n != NO_COLUMN), undated)

    def all(self) -> list[str]:
        return [*self.text, *self.date, "available_at", "source", "id"]


def first_of(names: Iterable[str], present: Iterable[Any]) -> str | None:
    """The first of the names that is present."""
    return next((name for name in names if name in present), None)


def names_of(head: Head) -> list[str]:
    """The names of all columns of the first rows."""
    return list(dict.fromkeys(str(name) for record in head for name in record))


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def quoted(names: Iterable[str]) -> str:
    """As in 'date' or 'day'."""
    return " or ".join(map(repr, names))


def check_columns(table: str, head: Head, columns: Columns, problems: Problems) -> None:
    """Raise DataError for a table without text, or whose dates stand in a column that was not named.

    table: what messages call it. A table with nothing that looks like a date is noted in `problems`.
    """
    names = names_of(head)
    if not names:
        return
    if first_of(columns.text, names) is None:
        raise DataError(
            f"{table}: no column {quoted(columns.text)} (found: {listed(names)}; pass --text-column)"
        )
    if columns.undated or first_of((*columns.date, "available_at"), names) is not None:
        return
    if found := other_date_column(head, columns.date):
        raise DataError(f"{table}: {found}, or --date-column {NO_COLUMN} for undated text")
    missing = f"no column {quoted(columns.date)} (found: {listed(names)}"
    if columns.date != Columns().date:
        raise DataError(f"{table}: {missing}; pass --date-column, or --date-column {NO_COLUMN})")
    problems.note(f"{missing}), so its documents have no date", table)


def other_date_column(head: Head, asked: Sequence[str]) -> str | None:
    """What to say of a column that holds days where none of the names asked for is there, if one does."""
    for name in names_of(head):
        values = [record.get(name) for record in head]
        option = "--date-column " + shlex.join((*(asked if tuple(asked) != Columns().date else ()), name))
        if _mostly(map(_is_day, values), values):
            return f"no column {quoted(asked)}, but {name!r} holds dates: pass {option}"
        if _mostly(map(_is_other_day, values), values):
            return (
                f"no column {quoted(asked)}, but {name!r} holds dates that are not ISO: "
                f"write them as 2015-01-31 and pass {option}"
            )
    return None


def _mostly(found: Iterable[bool], rows: Sequence[Any]) -> bool:
    return sum(found) >= MOSTLY * len(rows) > 0


def _is_day(value: Any) -> bool:
    try:
        day = None if isinstance(value, str) and len(value.strip()) < 8 else to_day(value)
    except ValueError:
        return False
    return day is not None and day.year in YEARS


def _is_other_day(value: Any) -> bool:
    """Whether it looks like a day in another form than to_day reads, as in 31.01.2015 or a mail's header."""
    if not isinstance(value, str) or len(value) > 40:
        return False
    return OTHER_DAY.match(value.strip()) is not None or parsedate_tz(value) is not None


def to_day(value: Any) -> datetime.date | None:
    """A day (UTC) out of a date, a datetime or ISO text; None for nothing. Raises ValueError for all else."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value.strip())
    if not isinstance(value, datetime.date):
        raise ValueError(f"{type(value).__name__} is no date")
    if not isinstance(value, datetime.datetime):
        return value
    try:
        return value.date() if value.tzinfo is None else value.astimezone(datetime.UTC).date()
    except OverflowError as error:  # in the year 1 or 9999
        raise ValueError(f"{value} has no day in UTC") from error

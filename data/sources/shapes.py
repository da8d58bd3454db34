"""Tables of numbers as people have them: long, prices of one entity, or one column for each entity.

    date,entity,value                            long; also date, entity and the columns of prices
    Date,Open,High,Low,Close,Adj Close,Volume    one entity, which the file is named after: Adj Close or Close
    Date,SPX,AAPL                                wide: a column for each entity, blank where it has no value
    Price,Close,Close / Ticker,SPX,AAPL / Date,, yfinance's: Adj Close or Close of each ticker, see pairs

Names of columns are the same in capital and small letters. What fits none of these, or more than one, is an
error: nothing is guessed from the values but that they are numbers.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.config import NO_COLUMN, Config
from data.documents import DataError
from data.problems import Problems
from data.series import MAIN_FIELDS, Row
from data.sources.columns import MOSTLY, Head, listed, names_of, other_date_column, quoted, to_day
from data.sources.formats import unpacked_name
from data.sources.pairs import CLOSES, closes_of, is_adjusted, plain

OPTIONAL = ("field", "unit", "available_at", "source")
ROW_NUMBERS = ("", "Unnamed: 0", "__index_level_0__")  # what pandas calls a column without a name
FIELDS = (*MAIN_FIELDS, "high", "low", "volume")
BESIDE = ("open", "high", "low", "volume")  # one of them beside a close, or two, make prices of one entity
ACCEPTED = (
    "a table of numbers has columns date, entity, value; or date, Open, High, Low, Close, Adj Close, Volume "
    "in a file named after the entity; or date and one column of numbers for each entity; or is yfinance's"
)


@dataclass(frozen=True)
class Wanted:
    """Names that the user gives to columns, of several the first that a table has."""

    date: tuple[str, ...] = ("date",)
    entity: tuple[str, ...] = ("entity",)
    value: tuple[str, ...] = ("value",)

    @classmethod
    def of(cls, config: Config) -> Wanted:
        return cls(config.date_column, config.entity_column, config.value_column)


@dataclass(frozen=True)
class Shape:
    """Where the rows of a table stand.

    entity: its column, None where `values` say it. values: entity by column of values, "" where the column
    `entity` says it. optional: columns that a table may have, by the names of OPTIONAL. wide: a blank
    value is no bad row, as entities do not all have the same days.
    """

    date: str
    entity: str | None
    values: Mapping[str, str]
    optional: Mapping[str, str]
    wide: bool = False

    def columns(self) -> list[str]:
        entity = [] if self.entity is None else [self.entity]
        return [self.date, *entity, *self.values, *self.optional.values()]

    def rows(self, place: str, record: Mapping[str, Any], problems: Problems) -> Iterator[Row]:
        """Of one line: none, and counted, for what is no row; a value that is no number is a NaN."""
        told = {name: record.get(column) for name, column in self.optional.items()}
        try:
            day, released = to_day(record.get(self.date)), to_day(told.get("available_at"))
        except ValueError:
            problems.skip("date is not ISO", place, "expected a date such as 2015-01-31")
            return
        field = str(told.get("field") or "close")
        if field not in FIELDS:
            problems.skip("unknown field", place, f"expected one of {listed(FIELDS)}")
            return
        for column, name in self.values.items():
            entity = name if self.entity is None else record.get(self.entity)
            if day is None or not isinstance(entity, str) or not entity:
                problems.skip("no date or entity", place)
                return
            value = record.get(column)
            if self.wide and _is_blank(value):
                continue
            where = f"{place}, column {column}" if self.wide else place
            unit = str(told.get("unit") or ("adjusted price" if is_adjusted(column) else "points"))
            yield Row(day, released or day, entity, field, _number(value), unit, where)


def shape_of(path: Path, head: Head, wanted: Wanted) -> Shape:
    """The shape of a table with these first rows. Raises DataError for one that cannot be told."""
    names = names_of(head)
    date = _find(wanted.date, names)
    if date is None:
        missing = f"no column {quoted(wanted.date)} (found: {listed(names)}); {ACCEPTED}"
        raise DataError(f"{path}: {other_date_column(head, wanted.date) or missing}")
    optional = {name: column for name in OPTIONAL if (column := _find((name,), names)) is not None}
    entity, value = _asked("entity", wanted.entity, names, path), _asked("value", wanted.value, names, path)
    others = [name for name in names if name not in (date, entity, value, *optional.values(), *ROW_NUMBERS)]
    if entity is None and NO_COLUMN not in wanted.entity:
        words = next((name for name in others if not _holds_numbers(head, name)), None)
        if words is not None:
            option = f"--entity-column {shlex.quote(words)} where it names the entity, or {NO_COLUMN}"
            raise DataError(
                f"{path}: column {words!r} does not hold numbers (found: {listed(names)}): pass {option} "
                f"where the file does; {ACCEPTED}"
            )
    stem = path.name[: len(unpacked_name(path).rsplit(".", 1)[0])]
    one = "" if entity is not None else stem
    if value is not None:
        return Shape(date, entity, {value: one}, optional)
    if entity is None and (tickers := closes_of(others)):
        return Shape(date, None, tickers, {}, wide=True)
    closes, beside = _closes(others), sum(plain(name) in BESIDE for name in others)
    if closes and (entity is not None or beside or len(closes) == len(others)):
        return Shape(date, entity, {closes[0]: one}, optional)
    # Entities may be called as an optional column or a price is: UNIT and LOW are shares.
    told = {name: column for name, column in optional.items() if not _holds_numbers(head, column)}
    entities = [name for name in names if name not in (date, *told.values(), *ROW_NUMBERS)]
    if entities and not (entity or closes or beside > 1 or NO_COLUMN in wanted.entity):
        return Shape(date, None, {name: name.strip() for name in entities}, told, wide=True)
    raise DataError(
        f"{path}: cannot tell which values to take (found: {listed(names)}): pass --value-column for those "
        f"of one entity, or write the table as date, entity, value; {ACCEPTED}"
    )


def _asked(what: str, asked: tuple[str, ...], names: list[str], path: Path) -> str | None:
    """The column of the user's choice. Raises DataError where a name that is not the default is not there."""
    found = _find(asked, names)
    if found is None and asked != (what,) and NO_COLUMN not in asked:
        raise DataError(f"{path}: no column {quoted(asked)} (found: {listed(names)}; pass --{what}-column)")
    return found


def _find(asked: Iterable[str], names: list[str]) -> str | None:
    """The first asked name that is there, if need be in other letters."""
    for name in asked:
        same = [name] if name in names else [other for other in names if other.lower() == name.lower()]
        if same:
            return same[0]
    return None


def _closes(names: list[str]) -> list[str]:
    """Columns of closing prices, adjusted ones first."""
    closes = [name for name in names if plain(name) in CLOSES]
    return sorted(closes, key=lambda name: not is_adjusted(name))


def _holds_numbers(head: Head, name: str) -> bool:
    """Whether what is in a column is numbers; so is a column in which nothing is yet."""
    values = [value for record in head if not _is_blank(value := record.get(name))]
    return sum(not math.isnan(_number(value)) for value in values) >= MOSTLY * len(values)


def _is_blank(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan

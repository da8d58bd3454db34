"""Rows of numbers, the units they are spoken of in, and trailing windows over one entity's rows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from data.documents import DataError

TRADING_DAYS = 252
MAIN_FIELDS = ("close", "rate", "index", "yield")


class Row(NamedTuple):
    """One observed number.

    date: the day it is about. available_at: the day it was published. entity: in words, e.g. "the S&P 500".
    field: one of MAIN_FIELDS, or "high", "low", "volume". unit: a key of UNITS. place: file and line it was
    read from, for messages.
    """

    date: date
    available_at: date
    entity: str
    field: str
    value: float
    unit: str
    place: str = ""


@dataclass(frozen=True, slots=True)
class Unit:
    """How a number is spoken of.

    words: after the number ("US dollars"). change: "percent" for prices, or the unit of a plain difference.
    hidden: relative changes are written, the level is not. Prices adjusted for later splits and dividends
    need this: their level on a past day was set by events after it, while ratios of them were not. splits:
    shares at the prices they were traded at, which a split divides overnight.
    """

    words: str
    change: str = "percent"
    hidden: bool = False
    splits: bool = False


class Spacing(NamedTuple):
    """How far apart the rows of a series are. gaps: its usual ones. longest: above it rows are missing."""

    name: str
    gaps: range
    longest: timedelta


SPACINGS = (
    Spacing("daily", range(5), timedelta(days=7)),  # markets closed that long in September 2001
    Spacing("weekly", range(5, 10), timedelta(days=11)),
    Spacing("monthly", range(26, 36), timedelta(days=45)),
    Spacing("quarterly", range(85, 97), timedelta(days=120)),
)
SPARSE = ("monthly", "quarterly")


def spacing_of(days: Sequence[int]) -> Spacing:
    """By the median gap between ordinals of days, in order; daily where it is none of SPACINGS."""
    gap = round(median(after - before for before, after in pairwise(days))) if len(days) > 1 else 1
    return next((spacing for spacing in SPACINGS if gap in spacing.gaps), SPACINGS[0])


UNITS = {
    "index points": Unit("points"),
    "dollars a barrel": Unit("dollars a barrel"),
    "dollars a share": Unit("dollars a share", splits=True),
    "volatility points": Unit("points", change="points"),
    "percent": Unit("percent", change="percentage points"),
    "adjusted dollars": Unit("dollars", hidden=True),
    "adjusted price": Unit("points", hidden=True),
    "price index": Unit("on the 1982-84 base"),
    "shares": Unit("shares"),
}


def unit_of(name: str) -> Unit:
    """A unit of UNITS; any other name is a price whose name is its words, e.g. "yen to the euro"."""
    return UNITS.get(name) or Unit(name)


class Series:
    """The main field of one entity in order of date, with trailing windows that end at a given position."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """rows: of one entity, in any order. Raises DataError: no main field, a repeated day, not a price."""
        self.entity = rows[0].entity
        self.rows = sorted((row for row in rows if row.field in MAIN_FIELDS), key=lambda row: row.date)
        if not self.rows:
            raise DataError(f"{self.entity}: no row with a field of {MAIN_FIELDS}")
        self.unit = unit_of(self.rows[0].unit)
        self.dates = [row.date for row in self.rows]
        self.values = [row.value for row in self.rows]
        # Reports may come out of order (one delayed); a value counts once all before it are out.
        self.released: list[date] = []
        for row in self.rows:
            self.released.append(
                max(row.available_at, self.released[-1] if self.released else row.available_at)
            )
        self.extras: dict[str, dict[date, float]] = {}
        for row in rows:
            if row.field not in MAIN_FIELDS:
                self.extras.setdefault(row.field, {})[row.date] = row.value
        for before, after in pairwise(self.dates):
            if before == after:
                raise DataError(f"{self.entity}: two values for {after}")
        for row in self.rows:
            if not math.isfinite(row.value) or (row.value <= 0 and self.unit.change == "percent"):
                raise DataError(f"{self.entity}: {row.value} on {row.date} is not a price")

    def change(self, last: int, steps: int) -> float:
        """Change over `steps` rows up to position `last`: a fraction for prices, else a difference."""
        now, then = self.values[last], self.values[last - steps]
        return now / then - 1 if self.unit.change == "percent" else now - then

    def volatility(self, last: int, days: int = 20) -> float:
        """Standard deviation of the last `days` changes: percent a year for prices, else units a day."""
        moves = [self.change(position, 1) for position in range(last - days + 1, last + 1)]
        mean = math.fsum(moves) / days
        deviation = math.sqrt(math.fsum((move - mean) ** 2 for move in moves) / (days - 1))
        return deviation * math.sqrt(TRADING_DAYS) * 100 if self.unit.change == "percent" else deviation

    def year_start(self, last: int) -> int:
        """First position of the 52 weeks that end at `last`."""
        return bisect_left(self.dates, self.dates[last] - timedelta(days=364))

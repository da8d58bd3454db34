"""Dated documents: the record sources yield, its JSON-lines form, and the split into train, val and test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

SPLITS = ("train", "val", "test")
VAL_SHARE = 0.05
TEST_SHARE = 0.05
END_OF_TEXT = "<|endoftext|>"
LEAST_BY_HASH = 90
"""So many documents leave a split of 5% empty once in a hundred times."""


class DataError(ValueError):
    """A mistake in the user's input or settings; programs print it as one line and exit 2."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and when the world could first read it.

    text: never empty. source: the domain it is reported under. date: the day the text is about.
    available_at: the day it was released, which alone decides the split. Both dates are None when unknown.
    id: what its origin calls it, if anything; a second document of the same id is dropped. group: the same
    for pieces of one text, which belong in one split; None for a document that is whole.
    """

    text: str
    source: str
    date: date | None
    available_at: date | None
    id: str | None = None
    group: str | None = None

    def to_json(self) -> str:
        """One JSON object on one line, keys always in the same order, without the group."""
        record = {
            "id": self.id,
            "text": self.text,
            "source": self.source,
            "date": self.date.isoformat() if self.date else None,
            "available_at": self.available_at.isoformat() if self.available_at else None,
        }
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Document:
        """Inverse of to_json. Raises DataError when the line is not such an object."""
        try:
            record = json.loads(line)
            return cls(
                text=record["text"],
                source=record["source"],
                date=_day(record["date"]),
                available_at=_day(record["available_at"]),
                id=record.get("id"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a document: {error!r}") from error


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _day(value: str | None) -> date | None:
    return None if value is None else date.fromisoformat(value)


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[Document]:
    """Documents of a file written by write_jsonl. Raises DataError (file and line) or OSError."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                yield Document.from_json(line)
            except DataError as error:
                raise DataError(f"{path}, line {number}: {error}") from error


def write_jsonl(path: str | os.PathLike[str], documents: Iterable[Document]) -> int:
    """Write one document per line and return how many; the file appears whole or not at all (OSError)."""
    target = Path(path)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(document.to_json() + "\n")
                count += 1
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


@dataclass(frozen=True, slots=True)
class SplitDates:
    """Cuts by release date.

    train: before validation_from - embargo; val: in [validation_from, test_from - embargo);
    test: in [test_from, until). Documents released inside an embargo gap, or from `until` on, belong to no
    split. The gap keeps what was written before a cut but released around it from sitting on both sides.
    """

    validation_from: date
    test_from: date
    until: date | None = None
    embargo_days: int = 7

    def __post_init__(self) -> None:
        if self.embargo_days < 0:
            raise DataError(f"embargo_days must not be negative, got {self.embargo_days}")
        ends = [self.validation_from, self.test_from, self.until or date.max]
        if not ends[0] < ends[1] < ends[2]:
            until = f", --until {self.until}" if self.until else ""
            raise DataError(f"cut dates must rise: --validation-from {ends[0]}, --test-from {ends[1]}{until}")

    def split_of(self, released: date) -> str | None:
        """'train', 'val', 'test', or None for a document that is left out."""
        gap = timedelta(days=self.embargo_days)
        if self.until is not None and released >= self.until:
            return None
        if released >= self.test_from:
            return "test"
        if released >= self.validation_from:
            return "val" if released < self.test_from - gap else None
        return "train" if released < self.validation_from - gap else None


def split_by_hash(text: str) -> str:
    """90/5/5 by the SHA-256 of the text: stable when the corpus grows, and equal texts share a split."""
    fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if fraction < 1 - VAL_SHARE - TEST_SHARE:
        return "train"
    return "val" if fraction < 1 - TEST_SHARE else "test"


def choose_split_dates(
    bytes_by_day: Mapping[date, int], embargo_days: int, until: date | None = None
) -> SplitDates:
    """Cuts after which about 10% and 5% of the bytes were released.

    bytes_by_day: text bytes per release day, not empty. Raises DataError when the days are too few.
    """
    days = sorted(day for day in bytes_by_day if until is None or day < until)
    if not days:
        raise DataError(
            f"no document was released before --until {until}; the first is of {min(bytes_by_day)}"
        )
    total = sum(bytes_by_day[day] for day in days)
    cuts: list[date] = []
    seen = 0
    for day in reversed(days):
        seen += bytes_by_day[day]
        if seen >= (TEST_SHARE, TEST_SHARE + VAL_SHARE)[len(cuts)] * total:
            cuts.append(day)
        if len(cuts) == 2:
            break
    if len(cuts) < 2 or days[0] >= cuts[1] - timedelta(days=embargo_days):
        raise DataError(
            f"the release dates ({len(days)} days, {days[0]} to {days[-1]}) are too close together for "
            "three splits; give --validation-from and --test-from, lower --embargo-days, or pass --split hash"
        )
    return SplitDates(cuts[1], cuts[0], until, embargo_days)

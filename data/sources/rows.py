"""The user's own numbers: tables with a column date, entity and value, told as notes or taken as bins.

A row may also have field (default close), unit (a key of data.series.UNITS or words such as "yen to the
dollar"; default "points"), available_at (default: the date) and source (default: the name of the file).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus
from data.documents import DataError, Document
from data.problems import Problems
from data.series import MAIN_FIELDS, Row
from data.sources.columns import to_day
from data.sources.files import find_files, kind_of, read_records
from data.sources.formats import unpacked_name
from data.tape import write_notes

NEEDED = ("date", "entity", "value")
COLUMNS = [*NEEDED, "field", "unit", "available_at", "source"]
FIELDS = (*MAIN_FIELDS, "high", "low", "volume")


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """The tables of --input: weekly notes on every entity, or its daily rows."""
    paths = find_files(config.input)
    plain = [path for path in paths if kind_of(path) == ".txt"]
    if plain:
        raise DataError(f"{plain[0]} is no table: --source rows reads .csv, .jsonl and .parquet")
    inputs = {str(path): sha256_of(path) for path in progress.track(paths, description="input files")}

    def documents(problems: Problems) -> Iterator[Document]:
        by_domain: dict[str, list[Row]] = {}
        for domain, row in read_rows(paths, problems):
            by_domain.setdefault(domain, []).append(row)
        for domain, rows in sorted(by_domain.items()):
            yield from write_notes(rows, problems, source=domain, rhythm="week")

    return Corpus(documents, inputs, lambda problems: read_rows(paths, problems))


def read_rows(paths: Sequence[Path], problems: Problems) -> Iterator[tuple[str, Row]]:
    """(domain, row) of all tables. Raises DataError for one without the columns of NEEDED."""
    for path in paths:
        stem = unpacked_name(path).rsplit(".", 1)[0]
        checked = False
        for place, record in read_records(path, COLUMNS, problems):
            missing = [name for name in NEEDED if name not in record]
            if missing and not checked:
                raise DataError(f"{place}: no column {missing[0]!r}; a row has {', '.join(NEEDED)}")
            checked = True
            row = _row(record, place, problems)
            if row is not None:
                yield str(record.get("source") or stem), row


def _row(record: Mapping[str, Any], place: str, problems: Problems) -> Row | None:
    """None, and counted, for what is no row; a value that is no number is counted with its series."""
    try:
        day, released = to_day(record.get("date")), to_day(record.get("available_at"))
    except ValueError:
        problems.skip("date is not ISO", place, "expected a date such as 2015-01-31")
        return None
    entity, field = record.get("entity"), str(record.get("field") or "close")
    if day is None or not isinstance(entity, str) or not entity:
        problems.skip("no date or entity", place)
        return None
    if field not in FIELDS:
        problems.skip("unknown field", place, f"expected one of {', '.join(FIELDS)}")
        return None
    try:
        value = float(record["value"])
    except (TypeError, ValueError):
        value = math.nan
    return Row(day, released or day, entity, field, value, str(record.get("unit") or "points"), place)

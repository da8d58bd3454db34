"""The user's own numbers: tables of a shape of data.sources.shapes, told as notes or taken as bins.

A row may also have field (default close), unit (a key of data.series.UNITS or words such as "yen to the
dollar"; default "points"), available_at (default: the date) and source (default: the name of the file).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus
from data.documents import DataError, Document
from data.problems import Problems
from data.series import Row, spacing_of
from data.sources.files import find_files, first_rows, kind_of, read_records
from data.sources.formats import unpacked_name
from data.sources.shapes import Wanted, shape_of
from data.tape import Rhythm, write_notes

RHYTHMS: dict[str, Rhythm] = {"daily": "week", "monthly": "release"}


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """The tables of --input: a note on each week of daily rows and on each monthly one; or the rows."""
    paths = find_files(config.input)
    plain = [path for path in paths if kind_of(path) == ".txt"]
    if plain:
        raise DataError(f"{plain[0]} is no table: --source rows reads .csv, .jsonl and .parquet")
    inputs = {str(path): sha256_of(path) for path in progress.track(paths, description="input files")}
    wanted = Wanted.of(config)

    def documents(problems: Problems) -> Iterator[Document]:
        by_domain: dict[str, list[Row]] = {}
        for domain, row in read_rows(paths, problems, wanted):
            by_domain.setdefault(domain, []).append(row)
        for domain, rows in sorted(by_domain.items()):
            for rhythm, told in by_rhythm(rows).items():
                yield from write_notes(told, problems, source=domain, rhythm=rhythm)

    return Corpus(documents, inputs, lambda problems: read_rows(paths, problems, wanted))


def by_rhythm(rows: Sequence[Row]) -> dict[Rhythm, list[Row]]:
    """The rows of daily entities, told by the week, and of monthly ones, told one by one.

    Raises DataError for an entity whose rows are a week or a quarter apart, for which there are no words.
    """
    days: dict[str, set[int]] = {}
    for row in rows:
        days.setdefault(row.entity, set()).add(row.date.toordinal())
    spacings = {entity: spacing_of(sorted(of)).name for entity, of in days.items()}
    found: dict[Rhythm, list[Row]] = {}
    for row in rows:
        rhythm = RHYTHMS.get(spacings[row.entity])
        if rhythm is None:
            raise DataError(
                f"{row.place}: the rows of {row.entity} are {spacings[row.entity]}, notes are written of "
                "daily and monthly ones: pass --view numbers, or leave it out"
            )
        found.setdefault(rhythm, []).append(row)
    return found


def read_rows(
    paths: Sequence[Path], problems: Problems, wanted: Wanted | None = None
) -> Iterator[tuple[str, Row]]:
    """(domain, row) of all tables. Raises DataError, before any row is given, for one of no known shape."""
    heads = [(path, first_rows(path)) for path in paths]
    shapes = [(path, shape_of(path, head, wanted or Wanted())) for path, head in heads if head]
    for path, shape in shapes:
        stem = unpacked_name(path).rsplit(".", 1)[0]
        source = shape.optional.get("source")
        for place, record in read_records(path, shape.columns(), problems):
            domain = str((source and record.get(source)) or stem)
            yield from ((domain, row) for row in shape.rows(place, record, problems))

"""The user's own text: .txt, .jsonl, .csv and .parquet files, packed or not, by path, folder or glob."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data.card import sha256_of
from data.cleaning import INVISIBLE
from data.config import Config
from data.corpus import Corpus
from data.documents import END_OF_TEXT, DataError, Document, is_unicode
from data.problems import Problems
from data.sources.columns import HEAD_ROWS, Columns, check_columns, first_of, listed, quoted, to_day
from data.sources.formats import PACKED, Record, csv_records, json_records, parquet_records, unpacked_name
from data.sources.packing import read_texts

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
MANY_FILES = 20
"""In one folder; more are one domain."""


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """The files of --input, less those inside --out and what killed runs have left beside it."""
    out = config.out.resolve()
    paths = [path for path in find_files(config.input) if not _is_output(path.resolve(), out)]
    columns = Columns.of(config)
    tracked = progress.track(paths, description="input files")
    inputs = {str(path): sha256_of(path) for path in tracked}
    folders = [folder for folder in map(Path, config.input) if folder.expanduser().is_dir()]
    return Corpus(lambda problems: read_files(paths, columns, problems, folders), inputs)


def _is_output(path: Path, out: Path) -> bool:
    beside = path.relative_to(out.parent).parts[0] if path.is_relative_to(out.parent) else ""
    return re.fullmatch(re.escape(out.name) + r"(\.(tmp|old)-[0-9a-f]{8})?", beside) is not None


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Files named by paths, folders (searched recursively) and globs, without repeats, in sorted order.

    Raises DataError for a missing path, a pattern or folder without readable files, or an unknown suffix.
    """
    if not inputs:
        raise DataError("--source files needs --input with files, folders or globs")
    found: set[Path] = set()
    for pattern in inputs:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [child for child in path.rglob("*") if child.is_file() and kind_of(child) is not None]
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not matches:
            if path.is_dir():
                reason = f"has no {', '.join(SUFFIXES)} file"
            else:
                reason = "matches no file" if glob.has_magic(str(path)) else "does not exist"
            raise DataError(f"--input {pattern} {reason}")
        found.update(matches)
    unknown = sorted(str(path) for path in found if kind_of(path) is None)
    if unknown:
        raise DataError(
            f"{unknown[0]}: unknown kind of file; expected {', '.join(SUFFIXES)}, "
            f"or these with {' or '.join(PACKED)}"
        )
    return sorted(found)


def kind_of(path: Path) -> str | None:
    """The suffix that selects the reader, .gz and .zst aside, or None when there is no reader."""
    name = unpacked_name(path)
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    return None if kind == ".parquet" and name != path.name.lower() else kind


def read_files(
    paths: Sequence[Path], columns: Columns, problems: Problems, folders: Sequence[Path] = ()
) -> Iterator[Document]:
    """Documents of all files, in order, streaming; `folders` are those that were named as a whole.

    Rows that cannot be used are counted in `problems`; DataError is raised for a file that is nothing of
    what its name says or lacks columns, before any document is given (see check_columns).
    """
    for path in paths:
        if kind_of(path) != ".txt":
            check_columns(str(path), first_rows(path), columns, problems)
    domains = domains_of(paths, folders)
    for path in paths:
        domain = domains[path]
        if kind_of(path) == ".txt":
            text = None
            for text, group in read_texts(path, problems):
                yield Document(text=text, source=domain, date=None, available_at=None, group=group)
            if text is None:
                problems.drop(domain, "no text")
            continue
        yield from read_table(read_records(path, columns.all(), problems), columns, domain, problems)


def domains_of(paths: Sequence[Path], folders: Sequence[Path]) -> dict[Path, str]:
    """The domain of what names none itself: the file's name, or its folder's where that has MANY_FILES.

    Files of subfolders that have fewer count as the folder's, up to one of `folders`.
    """
    tops = {folder.expanduser().resolve() for folder in folders}
    held: dict[Path, list[Path]] = {}
    for path in paths:
        held.setdefault(path.parent.resolve(), []).append(path)
    domains = {path: unpacked_name(path).rsplit(".", 1)[0] for path in paths}
    for depth in range(max((len(folder.parts) for folder in held), default=0), 0, -1):
        for folder in [each for each in held if len(each.parts) == depth]:
            files = held.pop(folder)
            if len({file.resolve() for file in files}) > MANY_FILES and folder.name:
                domains |= dict.fromkeys(files, folder.name)
            elif folder not in tops and any(top in folder.parents for top in tops):
                held.setdefault(folder.parent, []).extend(files)
    return domains


def read_table(
    records: Iterable[Record], columns: Columns, default_source: str, problems: Problems
) -> Iterator[Document]:
    """Documents out of the rows of one table, whose columns have been checked."""
    for place, record in records:
        if first_of(columns.text, record) is None:
            advice = f"found: {listed(map(str, record))}; pass --text-column"
            problems.skip(f"no column {quoted(columns.text)}", place, advice)
            continue
        document = _document(record, columns, default_source=default_source, place=place, problems=problems)
        if document is not None:
            yield document


def first_rows(path: Path) -> list[Mapping[str, Any]]:
    """Some rows from the beginning of a table, with all of their columns."""
    return [record for _, record in islice(read_records(path, None, Problems()), HEAD_ROWS)]


def read_records(path: Path, columns: list[str] | None, problems: Problems) -> Iterator[Record]:
    """(place, fields) of the rows of a .jsonl, .csv or .parquet file, of this with `columns` alone."""
    kind = kind_of(path)
    if kind == ".jsonl":
        return json_records(path, problems)
    return csv_records(path, problems) if kind == ".csv" else parquet_records(path, columns)


def _document(
    record: Mapping[str, Any], columns: Columns, *, default_source: str, place: str, problems: Problems
) -> Document | None:
    """None, and counted, for what is no usable document."""
    text, source = record[first_of(columns.text, record) or ""], record.get("source")
    source = source if isinstance(source, str) and source else default_source
    if text is None or (isinstance(text, str) and not text.strip()):
        problems.drop(source, "no text")
        return None
    name = record.get("id")
    fault = _fault(text)
    if fault is None and not (is_unicode(source) and is_unicode(str(name))):
        fault = "lone surrogate"
    if fault is not None:
        problems.skip(fault, place)
        return None
    try:
        day = to_day(record.get(first_of(columns.date, record) or ""))
        released = to_day(record.get("available_at"))
    except ValueError:
        problems.skip("date is not ISO", place, "expected a date such as 2015-01-31")
        return None
    if day and released and released < day:
        problems.note("available_at is earlier than the date, and decides the split", place)
    return Document(
        text=text.strip(),
        source=source,
        date=day or released,
        available_at=released or day,
        id=None if name is None else str(name),
    )


def _fault(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"text is {type(text).__name__}"
    if END_OF_TEXT in text or (INVISIBLE.search(text) and END_OF_TEXT in INVISIBLE.sub("", text)):
        return f"text contains the reserved mark {END_OF_TEXT}"
    return None if is_unicode(text) else "lone surrogate"

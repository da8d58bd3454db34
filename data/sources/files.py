"""The user's own text: .txt, .jsonl, .csv and .parquet files, gzipped or not, by path, folder or glob."""

from __future__ import annotations

import codecs
import csv
import datetime
import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.documents import END_OF_TEXT, DataError, Document

PACK_BYTES = 2048
MAX_BYTES = 8192
CHUNK_BYTES = 1 << 20
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns that hold text and date in .jsonl, .csv and .parquet files.

    `available_at` (release date) and `source` (domain) are used too where a file has them.
    """

    text: str = "text"
    date: str = "date"


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
            reason = f"has no {', '.join(SUFFIXES)} file" if path.is_dir() else "does not exist"
            raise DataError(f"--input {pattern} {reason}")
        found.update(matches)
    unknown = sorted(str(path) for path in found if kind_of(path) is None)
    if unknown:
        raise DataError(
            f"{unknown[0]}: unknown kind of file; expected {', '.join(SUFFIXES)}, optionally with .gz"
        )
    return sorted(found)


def kind_of(path: Path) -> str | None:
    """The suffix that selects the reader, '.gz' aside, or None when there is no reader."""
    name = path.name.lower()
    if name.endswith(".parquet.gz"):
        return None
    return next((suffix for suffix in SUFFIXES if name.removesuffix(".gz").endswith(suffix)), None)


def read_files(paths: Sequence[Path], columns: Columns) -> Iterator[Document]:
    """Documents of all files, in order, streaming. Raises DataError naming file and place if unreadable."""
    for path in paths:
        kind = kind_of(path)
        if kind == ".txt":
            yield from _read_text(path)
            continue
        records: Callable[[Path, Columns], Iterator[tuple[str, Mapping[str, Any]]]]
        records = {".jsonl": _jsonl_records, ".csv": _csv_records, ".parquet": _parquet_records}[str(kind)]
        for where, record in records(path, columns):
            document = _document(record, columns, default_source=_stem(path), where=where)
            if document is not None:
                yield document


def pack_paragraphs(paragraphs: Iterator[str]) -> Iterator[str]:
    """Join neighbouring paragraphs into texts of about PACK_BYTES, cutting long ones to at most MAX_BYTES."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        for piece in _pieces(paragraph):
            length = len(piece.encode()) + 2
            if held and size + length > MAX_BYTES:
                yield "\n\n".join(held)
                held, size = [], 0
            held.append(piece)
            size += length
            if size >= PACK_BYTES:
                yield "\n\n".join(held)
                held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _pieces(paragraph: str) -> Iterator[str]:
    """Cut at the last sentence end, else the last space, before MAX_BYTES less the joining blank line."""
    limit = MAX_BYTES - 2
    while len(paragraph.encode()) > limit:
        head = paragraph.encode()[:limit].decode(errors="ignore")
        cut = max(head.rfind(". ") + 1, head.rfind("\n"))
        if cut < limit // 4:
            cut = head.rfind(" ")
        if cut <= 0:
            cut = len(head)
        yield paragraph[:cut].rstrip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph


def _read_text(path: Path) -> Iterator[Document]:
    for section in _sections(path):
        for text in pack_paragraphs(section):
            yield Document(text=text, source=_stem(path), date=None, available_at=None)


def _sections(path: Path) -> Iterator[Iterator[str]]:
    """Runs of paragraphs between <|endoftext|> marks; a packed document never crosses a mark."""
    pending: list[str] = []
    for paragraph in _paragraphs(path):
        first, *rest = paragraph.split(END_OF_TEXT)
        pending.append(first)
        for part in rest:
            yield (text.strip() for text in pending if text.strip())
            pending = [part]
        if sum(map(len, pending)) > CHUNK_BYTES:
            yield (text.strip() for text in pending if text.strip())
            pending = []
    yield (text.strip() for text in pending if text.strip())


def _paragraphs(path: Path) -> Iterator[str]:
    """Blocks of lines separated by blank lines; one over MAX_BYTES ends at a line end, to bound memory."""
    block: list[str] = []
    size = 0
    for _, line in _lines(path, cut_lines=True):
        length = len(line.encode())
        blank = not line.strip()
        if block and (blank or size + length > MAX_BYTES):
            yield "\n".join(block)
            block, size = [], 0
        if not blank:
            block.append(line.rstrip("\n"))
            size += length
    if block:
        yield "\n".join(block)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path, *, cut_lines: bool = False) -> Iterator[tuple[int, str]]:
    """(line number, line) of a UTF-8 file, decoded strictly in chunks; a byte order mark is dropped.

    Windows line ends are read as plain ones. cut_lines: end lines over CHUNK_BYTES at a space.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    tail = ""
    number = 0
    with _open(path) as file:
        while True:
            try:
                chunk = file.read(CHUNK_BYTES)
            except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                raise DataError(f"{path}: broken gzip file: {error}") from error
            undecoded = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = position - undecoded + error.start
                byte = error.object[error.start]
                unpacked = " of the unpacked text" if path.name.lower().endswith(".gz") else ""
                raise DataError(
                    f"{path}: not UTF-8 at byte offset {offset}{unpacked} (byte 0x{byte:02x}); "
                    "convert the file, for example with iconv -t utf-8"
                ) from error
            if position == 0:
                text = text.removeprefix("\ufeff")
            position += len(chunk)
            lines = re.split(r"\r\n|\n", tail + text) if chunk else [tail + text, ""]
            tail = lines.pop()
            for line in lines:
                number += 1
                yield number, line + "\n"
            if not chunk:
                return
            if cut_lines and len(tail) > CHUNK_BYTES:
                cut = tail.rfind(" ") + 1 or len(tail)
                yield number, tail[:cut]
                tail = tail[cut:]


def _jsonl_records(path: Path, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
        yield where, record


def _csv_records(path: Path, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for record in reader:
            yield f"{path}, line {reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV: {error}") from error


def _parquet_records(path: Path, columns: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"{path}: reading .parquet needs pyarrow; install it with: pip install pyarrow"
        ) from error
    try:
        file = parquet.ParquetFile(path)
        wanted = [columns.text, columns.date, "available_at", "source"]
        names = [name for name in file.schema_arrow.names if name in wanted]
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _document(
    record: Mapping[str, Any], columns: Columns, *, default_source: str, where: str
) -> Document | None:
    """None for a blank text."""
    if columns.text not in record:
        names = ", ".join(str(name) for name in record) or "none"
        raise DataError(f"{where}: no column {columns.text!r} (found: {names}); pass --text-column")
    text = record[columns.text]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{where}: column {columns.text!r} holds {type(text).__name__}, expected text")
    text = text.strip()
    if not text:
        return None
    if END_OF_TEXT in text:
        raise DataError(
            f"{where}: the text contains the reserved mark {END_OF_TEXT}; remove it or split the text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text is not valid Unicode (lone surrogate at {error.start})"
        ) from error
    day = _date(record.get(columns.date), where)
    released = _date(record.get("available_at"), where)
    source = record.get("source")
    return Document(
        text=text,
        source=source if isinstance(source, str) and source else default_source,
        date=day or released,
        available_at=released or day,
    )


def _date(value: Any, where: str) -> datetime.date | None:
    if value is None or value == "":
        return None
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(value[:10])
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: date {value!r} is not an ISO date such as 2015-01-31") from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".GZ").rsplit(".", 1)[0]

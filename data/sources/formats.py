"""Lines, JSON lines, CSV and parquet, plain, .gz or .zst: streamed, unusable rows counted by place."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data.documents import DataError, is_unicode
from data.problems import NOT_UTF8, Problems
from data.sources.pairs import HEADER_LINES, LEVELS, joined_header

CHUNK_BYTES = 1 << 20
FIELD_BYTES = 1 << 24  # longest field of a CSV; an open quote does not swallow more than this
PACKED = (".gz", ".zst")
Fault = tuple[str, str]  # a place and advice
Record = tuple[str, Mapping[str, Any]]  # its place in words, and its fields


def unpacked_name(path: Path) -> str:
    """The file's name in lower case, without .gz or .zst."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)


def read_lines(
    path: Path, problems: Problems, *, cut: bool = False, escaped: list[Fault] | None = None
) -> Iterator[tuple[int, str]]:
    """(line number, line with its \\n) of a UTF-8 file; a byte order mark is dropped.

    Windows line ends are read as plain ones. A line that is not UTF-8 is counted and left out; with `escaped`
    it is noted there and given all the same, a lone surrogate for a byte, as what it is part of may be more
    than a line. cut: lines over CHUNK_BYTES end at a space. Raises DataError for a broken archive or another
    encoding throughout.
    """
    number, offset = 0, 0
    tail = b""
    for chunk in _chunks(path):
        if offset == 0:
            _check_encoding(path, chunk)
            chunk = chunk.removeprefix(b"\xef\xbb\xbf")
        content = tail + chunk
        end = content.rfind(b"\n") + 1
        if not end and cut and len(content) > CHUNK_BYTES:
            end = content.rfind(b" ") + 1
            if end:
                yield from _decoded(path, [content[:end]], number, offset, problems, escaped)
        elif end:
            lines = content[:end].split(b"\n")[:-1]
            yield from _decoded(path, lines, number, offset, problems, escaped)
            number += len(lines)
        tail = content[end:]
        offset += end
    if tail:
        yield from _decoded(path, [tail], number, offset, problems, escaped)


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked. Raises DataError for a broken archive or without a library for it."""
    name = path.name.lower()
    if name.endswith(".zst"):
        yield from _zst_chunks(path)
        return
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: broken gzip file: {error}") from error


def _zst_chunks(path: Path) -> Iterator[bytes]:
    zstandard = _library("zstandard", path)
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(path, "rb") as file:
        packed = file.read(CHUNK_BYTES // 8)
        while packed:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise DataError(f"{path}: broken zst file: {error}") from error
            if unpacked:
                yield unpacked
            packed = frame.unused_data if frame.eof else b""
            packed = packed or file.read(CHUNK_BYTES // 8)
    if not frame.eof:
        raise DataError(f"{path}: broken zst file: it ends early")


def _check_encoding(path: Path, start: bytes) -> None:
    for mark, name in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if start.startswith(mark):
            raise DataError(f"{path}: is {name}, not UTF-8; convert it: iconv -f {name} -t utf-8")


def _decoded(
    path: Path, lines: list[bytes], number: int, offset: int, problems: Problems, escaped: list[Fault] | None
) -> Iterator[tuple[int, str]]:
    """The lines, numbered after `number`, as read_lines gives them; offset: of the first, in bytes."""
    for line in lines:
        number += 1
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            place = f"{path}, line {number}"
            where = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
            advice = f"{where}; convert the file, for example with iconv -t utf-8"
            if escaped is None:
                problems.skip(NOT_UTF8, place, advice)
            else:
                escaped.append((place, advice))
                yield number, line.decode(errors="surrogateescape").removesuffix("\r") + "\n"
        else:
            yield number, text.removesuffix("\r") + "\n"
        offset += len(line) + 1


def json_records(path: Path, problems: Problems) -> Iterator[Record]:
    """The objects of a file of JSON lines; blank lines are nothing."""
    for number, line in read_lines(path, problems):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            problems.skip("not JSON", place)
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            problems.skip("not a JSON object", place)


def csv_records(path: Path, problems: Problems) -> Iterator[Record]:
    """The rows of a CSV file whose first line names the columns, or whose first three do, see pairs.

    Raises DataError when the names are not UTF-8.
    """
    lines = _csv_lines(path, problems)
    start = list(islice(lines, 1))
    if not start:
        return
    place, names, fault = start[0]
    if not all(map(is_unicode, names)):
        place, advice = fault or (place, "")
        raise DataError(f"{place}: not UTF-8; {advice}")
    if names and names[0] in LEVELS:
        start += islice(lines, HEADER_LINES - 1)
    joined = joined_header([cells for _, cells, _ in start])
    for place, cells, fault in lines if joined else chain(start[1:], lines):
        if fault is not None:
            problems.skip(NOT_UTF8, *fault)
        elif len(cells) != len(joined or names):
            problems.skip("another number of columns", place)
        else:
            yield place, dict(zip(joined or names, cells, strict=True))


def _csv_lines(path: Path, problems: Problems) -> Iterator[tuple[str, list[str], Fault | None]]:
    """(place, cells, what is not UTF-8 in them) of the lines of a CSV, empty ones but the first left out."""
    csv.field_size_limit(FIELD_BYTES)
    escaped: list[Fault] = []
    reader = csv.reader((line for _, line in read_lines(path, problems, escaped=escaped)), strict=True)
    first = True
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            problems.skip("broken CSV", f"{path}, line {reader.line_num}")
        else:
            if cells or first:
                yield f"{path}, line {reader.line_num}", cells, escaped[0] if escaped else None
            first = False
        escaped.clear()


def parquet_records(path: Path, columns: list[str] | None) -> Iterator[Record]:
    """The rows of a parquet file with those of `columns` that it has, or with all."""
    arrow, parquet = _library("pyarrow", path), _library("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _library(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        advice = f"install it with: pip install {package}"
        raise DataError(f"{path}: reading it needs {package}; {advice}") from error

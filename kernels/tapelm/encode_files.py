"""Files into token shards: streamed, on all cores, and continued where a killed run stopped.

One thread finds blocks of input, the C++ encoder (csrc/text/encode_files.h) turns one on every core into
tokens, and whichever core has the next one writes and hashes it. Shards grow in OUT.partial; its
journal.jsonl says for every finished shard where in the inputs encoding goes on after it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tapelm import _text
from tapelm.shards import ShardWriter, check_settings, replace_directory, replaceable, token_dtype

JOURNAL = "journal.jsonl"
BLOCK_BYTES = 1 << 21  # of text, encoded at a time
PIECE_BYTES = 1 << 19  # of a plain text, read at a time
_of_thread = threading.local()


@dataclass(frozen=True)
class Encoding:
    """A tokenizer as `encode_files` needs it."""

    bpe: _text.Bpe
    vocab_size: int
    end_of_text: int
    specials: list[bytes]
    tokenizer_sha256: str

    @property
    def token_bytes(self) -> int:
        return token_dtype(self.vocab_size).itemsize


@dataclass(frozen=True)
class Position:
    """A place in the inputs: byte `offset` of file number `file`, perhaps `inside` a plain text."""

    file: int = 0
    offset: int = 0
    inside: bool = False


@dataclass(frozen=True)
class Lines:
    """Whole lines of a .jsonl file, read by the thread that encodes them."""

    position: Position
    path: Path
    size: int

    def encode(self, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        content = _warm_memory(self.size)
        with self.path.open("rb") as file:
            file.seek(self.position.offset)
            if file.readinto(content) != self.size:
                raise ValueError(f"{self.path} changed while it was encoded: encode it again")
        tokens = encoding.end_of_text, encoding.token_bytes
        try:
            return _text.encode_lines(encoding.bpe, content, str(self.path), 1, *tokens)
        except ValueError:  # the same again, with the line counted from the beginning of the file
            line = _lines_before(self.path, self.position.offset) + 1
            return _text.encode_lines(encoding.bpe, content, str(self.path), line, *tokens)


@dataclass(frozen=True)
class Piece:
    """Plain text of one file; the last piece of a file ends its document."""

    position: Position
    path: Path
    content: bytes
    ends: bool

    @property
    def place(self) -> str:
        return f"{self.path}, from byte {self.position.offset}" if self.position.offset else str(self.path)


@dataclass(frozen=True)
class Pieces:
    """Pieces of one or more files."""

    pieces: list[Piece]

    @property
    def position(self) -> Position:
        return self.pieces[0].position

    def encode(self, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        return _text.encode_pieces(
            encoding.bpe,
            [piece.content for piece in self.pieces],
            [piece.place for piece in self.pieces],
            [piece.ends for piece in self.pieces],
            self.position.inside,
            encoding.end_of_text,
            encoding.token_bytes,
        )


def encode_files(
    encoding: Encoding, paths: list[Path], out_dir: str | os.PathLike[str], shard_tokens: int
) -> dict[str, Any]:
    """Encode `paths` into shards at `out_dir`; see `Tokenizer.encode_files`."""
    check_settings(encoding.vocab_size, encoding.end_of_text, shard_tokens)
    target = replaceable(out_dir)
    partial = target.with_name(f"{target.name}.partial")
    inputs = [_identity(path) for path in paths]
    key = {
        "version": 2,
        "inputs": inputs,
        "tokenizer_sha256": encoding.tokenizer_sha256,
        "end_of_text": encoding.end_of_text,
        "shard_tokens": shard_tokens,
    }
    partial.mkdir(parents=True, exist_ok=True)
    kept = False
    with (partial / JOURNAL).open("a+", encoding="utf-8") as journal:
        _lock(journal, out_dir)
        try:
            shards, position, skip = _read_journal(journal, partial, key)
            writer = _write(encoding, paths, partial, shard_tokens, journal, shards, position, skip)
            for path, before in zip(paths, inputs, strict=True):
                if _identity(path) != before:
                    raise ValueError(f"{path} changed while it was encoded: encode it again")
            manifest = writer.write_manifest()
            replace_directory(partial, target)
            kept = True
            (target / JOURNAL).unlink()  # after the lock on it has kept others out of `partial`
        except ValueError:
            raise  # a fault of the inputs: nothing of this is of use
        except BaseException:
            kept = True
            raise
        finally:
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write(
    encoding: Encoding,
    paths: list[Path],
    partial: Path,
    shard_tokens: int,
    journal: TextIO,
    shards: list[dict[str, Any]],
    position: Position,
    skip: int,
) -> ShardWriter:
    """Encode from `position` on, without the first `skip` tokens of it, into shards after `shards`."""
    current = (position, 0)  # of the block that is being written, and what was left out of it
    left_out = skip

    def record(entry: dict[str, Any], used: int) -> None:
        _append(journal, {"shard": entry, "position": asdict(current[0]), "skip": current[1] + used})

    writer = ShardWriter(partial, encoding.vocab_size, encoding.end_of_text, shard_tokens, shards, record)

    def write(position: Position, tokens: np.ndarray, starts: np.ndarray) -> None:
        nonlocal current, left_out
        # Blocks need not be those of the run that was killed: what it wrote may be several of them.
        skip = min(left_out, tokens.size)
        left_out -= skip
        current = (position, skip)
        writer.add(tokens[skip:], starts[np.searchsorted(starts, skip) :] - np.uint64(skip))

    cores = os.cpu_count() or 1
    in_order = _InOrder(write)
    written: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(cores) as encoders:
            for block in read_blocks(paths, position, encoding.specials):
                written.append(in_order.expect())
                encoders.submit(in_order.encode, block, encoding, written[-1])
                if len(written) > 4 * cores:
                    written.popleft().result()
            while written:
                written.popleft().result()
    except BaseException:
        writer.close()
        raise
    return writer


class _InOrder:
    """Hands blocks to `write` in the order of `expect`, on whichever encoding thread has the next one.

    A thread of its own for writing would be one more than there are cores, and in the way of the others. A
    block's future is done when it is written; behind one that fails nothing is written.
    """

    def __init__(self, write: Callable[[Position, np.ndarray, np.ndarray], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._expected: deque[Future[None]] = deque()
        self._encoded: dict[Future[None], tuple[Position, np.ndarray, np.ndarray]] = {}
        self._busy = False

    def expect(self) -> Future[None]:
        written: Future[None] = Future()
        with self._lock:
            self._expected.append(written)
        return written

    def encode(self, block: Lines | Pieces, encoding: Encoding, written: Future[None]) -> None:
        try:
            encoded = (block.position, *block.encode(encoding))
        except BaseException as error:
            written.set_exception(error)
            return
        with self._lock:
            self._encoded[written] = encoded
        while (ready := self._next()) is not None:
            try:
                self._write(*ready[1])
            except BaseException as error:  # stays busy
                ready[0].set_exception(error)
                return
            with self._lock:
                self._busy = False
            ready[0].set_result(None)

    def _next(self) -> tuple[Future[None], tuple[Position, np.ndarray, np.ndarray]] | None:
        """What to write now, unless another thread is writing: that one comes back for it."""
        with self._lock:
            if self._busy or not self._expected or self._expected[0] not in self._encoded:
                return None
            self._busy = True
            written = self._expected.popleft()
            return written, self._encoded.pop(written)


def read_blocks(
    paths: list[Path],
    start: Position,
    specials: list[bytes],
    block_bytes: int = BLOCK_BYTES,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[Lines | Pieces]:
    """The inputs from a position on in blocks of about `block_bytes`, whose tokens are those of the whole."""
    pieces: list[Piece] = []
    size = 0
    for number in range(start.file, len(paths)):
        path = paths[number]
        begin = start if number == start.file else Position(number)
        if path.suffix == ".jsonl":
            if pieces:
                yield Pieces(pieces)
                pieces, size = [], 0
            yield from _read_lines(path, begin, block_bytes)
            continue
        for piece in _read_pieces(path, begin, specials, piece_bytes):
            pieces.append(piece)
            size += len(piece.content)
            if size >= block_bytes or len(pieces) >= 4096:
                yield Pieces(pieces)
                pieces, size = [], 0
    if pieces:
        yield Pieces(pieces)


def _read_lines(path: Path, begin: Position, block_bytes: int) -> Iterator[Lines]:
    offset, size = begin.offset, path.stat().st_size
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset + block_bytes - 1)
            file.readline()
            end = min(file.tell(), size)
            yield Lines(Position(begin.file, offset), path, end - offset)
            offset = end


def _warm_memory(size: int) -> memoryview:
    """`size` bytes that belong to this thread, the same at every call: warm in its cache."""
    if len(getattr(_of_thread, "memory", b"")) < size:
        _of_thread.memory = bytearray(size)
    return memoryview(_of_thread.memory)[:size]


def _lines_before(path: Path, offset: int) -> int:
    lines = 0
    with path.open("rb") as file:
        while offset > 0 and (chunk := file.read(min(offset, BLOCK_BYTES))):
            lines += chunk.count(b"\n")
            offset -= len(chunk)
    return lines


def _read_pieces(path: Path, begin: Position, specials: list[bytes], piece_bytes: int) -> Iterator[Piece]:
    offset, inside = begin.offset, begin.inside
    with path.open("rb") as file:
        file.seek(offset)
        pending = b""
        # Text that cannot be cut doubles from read to read, so that looking for a cut stays linear.
        while chunk := file.read(max(piece_bytes, len(pending))):
            pending += chunk
            cut = _text.safe_cut(pending, specials)
            if cut:
                yield Piece(Position(begin.file, offset, inside), path, pending[:cut], False)
                pending = pending[cut:]
                offset, inside = offset + cut, True
        yield Piece(Position(begin.file, offset, inside), path, pending, True)


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _lock(journal: TextIO, out_dir: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is encoding to {os.fspath(out_dir)}: wait for it") from error


def _append(journal: TextIO, record: dict[str, Any]) -> None:
    journal.write(json.dumps(record) + "\n")
    journal.flush()
    if "shard" in record:  # without one there is nothing that could be lost
        os.fsync(journal.fileno())


def _read_journal(
    journal: TextIO, partial: Path, key: dict[str, Any]
) -> tuple[list[dict[str, Any]], Position, int]:
    """Finished shards, where to go on, and how many tokens from there are in them.

    A journal of other inputs, tokenizer or settings is begun anew. Of one that fits, what follows the first
    line that is damaged, or whose shard is not there, does not count.
    """
    journal.seek(0)
    records: list[dict[str, Any]] = []
    good = 0  # bytes
    for line in journal.buffer.read().splitlines(keepends=True):  # type: ignore[attr-defined]
        record = _read_record(line)
        if record is None or (record != key if not records else not _is_finished(record, partial)):
            break
        records.append(record)
        good += len(line)
    journal.truncate(good)
    if not records:
        _append(journal, key)
    shards = [record["shard"] for record in records[1:]]
    kept = {shard["file"] for shard in shards} | {JOURNAL}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    if not shards:
        return [], Position(), 0
    return shards, Position(**records[-1]["position"]), records[-1]["skip"]


def _read_record(line: bytes) -> dict[str, Any] | None:
    """A whole line of the journal, None when it is no JSON object."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_finished(record: dict[str, Any], partial: Path) -> bool:
    """Whether a line of the journal is about a shard that is there in full."""
    match record:
        case {
            "shard": {"file": str(name), "bytes": int(size), "tokens": int(), "documents": int(), **hashed},
            "position": {"file": int(), "offset": int(), "inside": bool(), **rest},
            "skip": int(),
        } if "sha256" in hashed and not rest and Path(name).name == name:
            path = partial / name
            return path.is_file() and path.stat().st_size == size
    return False

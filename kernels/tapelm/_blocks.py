"""Files in blocks that can be encoded one by one, and give the tokens of the whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapelm import _text
from tapelm._shard_writer import token_dtype

BLOCK_BYTES = 1 << 21  # of text, encoded at a time
PIECE_BYTES = 1 << 19  # of a plain text, read at a time
LOOK_BYTES = 1 << 14  # read at a time to find the end of a line
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
        if _read_at(self.path, self.position.offset, content) != self.size:
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
        if path.suffix.lower() == ".jsonl":
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
    with path.open("rb", buffering=0) as file:
        while offset < size:
            end = _line_end(file.fileno(), offset + block_bytes - 1, size)
            yield Lines(Position(begin.file, offset), path, end - offset)
            offset = end


def _line_end(descriptor: int, at: int, size: int) -> int:
    """Where the line that has byte `at` of a file of `size` bytes ends."""
    while at < size and (chunk := os.pread(descriptor, LOOK_BYTES, at)):
        if (found := chunk.find(b"\n")) >= 0:
            return at + found + 1
        at += len(chunk)
    return size


def _read_at(path: Path, offset: int, memory: memoryview) -> int:
    """Fill `memory` from byte `offset` on; returns how many bytes there were.

    Few calls, as each lets other threads run in Python, for which this one then waits.
    """
    descriptor, done = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        while done < len(memory) and (count := os.preadv(descriptor, [memory[done:]], offset + done)):
            done += count
    finally:
        os.close(descriptor)
    return done


def _warm_memory(size: int) -> memoryview:
    """`size` bytes that belong to this thread, the same at every call: warm in its cache."""
    if len(getattr(_of_thread, "memory", b"")) < size:
        _of_thread.memory = np.empty(size + size // 8, np.uint8).data  # each block ends with its last line
    return _of_thread.memory[:size]


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

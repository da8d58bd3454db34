"""Shard files as they are written; the Python face of csrc/text/shards.h, which has the layout of one.

Tokens are hashed as they are written, and counts are known at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tapelm import _text

MANIFEST = "manifest.json"
FORMAT = "tapelm-shards"
VERSION = 2
# Bytes after which the kernel is told to start writeback, so that the fsync at the end waits for little.
_START_BYTES = 1 << 21


class ShardWriter:
    """Appends tokens to numbered shard files of a directory, after `shards` that are there already.

    `finished(entry, used)` is called for every full shard, once it is safely on disk: its entry of the
    manifest, and how many tokens of the current `add` it and the shards before it hold.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        end_of_text: int,
        shard_tokens: int,
        shards: Iterable[dict[str, Any]] = (),
        finished: Callable[[dict[str, Any], int], None] = lambda entry, used: None,
    ) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._end_of_text = end_of_text
        self._limit = shard_tokens
        self._finished = finished
        self._file: Any = None
        self._tokens = 0
        self._starts: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._unstarted = 0
        self._closed = False
        self.dtype = token_dtype(vocab_size)
        self.shards = list(shards)

    def add(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Append tokens (n,) in which documents begin at `starts` (k,) uint64, ascending."""
        self._check_open()
        used = 0
        while used < ids.size:
            if self._file is None:
                self._file = (self._directory / shard_name(len(self.shards))).open("wb")
                self._file.write(self._header())
            part = ids[used : used + self._limit - self._tokens]
            begin, end = np.searchsorted(starts, (used, used + part.size))
            self._starts.append(starts[begin:end] - np.uint64(used) + np.uint64(self._tokens))
            self._append(part.astype(self.dtype, copy=False).data)
            self._tokens += part.size
            used += part.size
            if self._tokens == self._limit:
                self.finish()
                self._finished(self.shards[-1], used)

    def finish(self) -> None:
        """Complete the open shard: document starts, header, hash."""
        self._check_open()
        if self._file is None:
            return
        with self._file as file:
            self._append(bytes(-file.tell() % 8))
            self._append(np.concatenate(self._starts).astype("<u8").data)
            size = file.tell()
            file.seek(0)
            file.write(self._header())
            file.flush()
            os.fsync(file.fileno())
        self.shards.append(
            {
                "file": Path(file.name).name,
                "tokens": self._tokens,
                "documents": self._documents(),
                "bytes": size,
                "sha256": self._digest.hexdigest(),
            }
        )
        self._file, self._tokens, self._starts = None, 0, []
        self._digest, self._unstarted = hashlib.sha256(), 0

    def _append(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._unstarted += len(memoryview(content).cast("B"))
        if self._unstarted >= _START_BYTES:
            self._file.flush()
            _text.start_writing(self._file.fileno())
            self._unstarted = 0

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the writer of these shards is closed")

    def close(self) -> None:
        """Give up the open shard, if any; nothing can be added any more."""
        self._closed = True
        if self._file is not None:
            self._file.raw.close()
            self._file = None

    def _header(self) -> bytes:
        return shard_header(self._vocab_size, self._end_of_text, self._tokens, self._documents())

    def _documents(self) -> int:
        return sum(map(len, self._starts))

    def write_manifest(self) -> dict[str, Any]:
        """Complete the last shard and write manifest.json, which is returned."""
        self.finish()
        if not self.shards:
            raise ValueError("documents are empty: there is nothing to write")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "vocab_size": self._vocab_size,
            "end_of_text": self._end_of_text,
            "dtype": self.dtype.name,
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": sum(shard["documents"] for shard in self.shards),
            "shards": self.shards,
        }
        with (self._directory / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How ids are stored: uint16 up to a vocabulary of 65,536, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def shard_header(vocab_size: int, end_of_text: int, tokens: int, documents: int) -> bytes:
    itemsize = token_dtype(vocab_size).itemsize
    return _text.shard_header(itemsize, tokens, documents, vocab_size, end_of_text)

"""Token shards on disk; the Python face of csrc/text/shards.h, which has the layout of a shard file.

A shard directory holds `shard-00000.bin`, ... and `manifest.json` with the counts and the SHA-256 of every
shard. The shards of a directory are one sequence of tokens in which every document ends with the end-of-text
token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tapelm import _text

MANIFEST = "manifest.json"
_FORMAT = "tapelm-shards"
_VERSION = 1


class _ShardWriter:
    """Appends tokens to numbered shard files of a directory; never holds more than one document."""

    def __init__(self, directory: Path, vocab_size: int, end_of_text: int, shard_tokens: int) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._end_of_text = end_of_text
        self._limit = shard_tokens
        self._dtype = np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)
        self._file: Any = None
        self._tokens = 0
        self._starts = array("Q")
        self.shards: list[dict[str, Any]] = []

    def add_document(self, ids: np.ndarray) -> None:
        starts = True
        while ids.size:
            if self._file is None:
                self._file = (self._directory / f"shard-{len(self.shards):05d}.bin").open("w+b")
                self._file.write(self._header())
            if starts:
                self._starts.append(self._tokens)
                starts = False
            part = ids[: self._limit - self._tokens]
            self._file.write(part.astype(self._dtype).data)
            self._tokens += part.size
            ids = ids[part.size :]
            if self._tokens == self._limit:
                self.finish()

    def finish(self) -> None:
        """Complete the open shard: document starts, header, hash."""
        if self._file is None:
            return
        with self._file as file:
            file.write(bytes(-file.tell() % 8))
            file.write(self._starts.tobytes())
            file.seek(0)
            file.write(self._header())
            file.flush()
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append(
            {
                "file": Path(file.name).name,
                "tokens": self._tokens,
                "documents": len(self._starts),
                "bytes": size,
                "sha256": digest,
            }
        )
        self._file, self._tokens, self._starts = None, 0, array("Q")

    def close(self) -> None:
        """Give up the open shard, if any."""
        if self._file is not None:
            self._file.raw.close()
            self._file = None

    def _header(self) -> bytes:
        return _text.shard_header(
            self._dtype.itemsize, self._tokens, len(self._starts), self._vocab_size, self._end_of_text
        )


def write_shards(
    documents: Iterable[np.ndarray],
    out_dir: str | os.PathLike[str],
    *,
    vocab_size: int,
    end_of_text: int,
    shard_tokens: int = 2**26,
) -> dict[str, Any]:
    """Write documents (integer arrays of shape (n,)) as token shards and return the manifest.

    Every document is ended by `end_of_text`, which is added unless it is the last token already. Ids are
    stored as uint16 up to a vocabulary of 65,536, else as uint32; a shard has `shard_tokens` tokens, the last
    one the rest. Everything is written to a directory beside `out_dir` that takes its place when complete:
    whatever goes wrong (a full disk included), shards that were there stay.

    Raises:
        ValueError: no documents, ids outside the vocabulary, `end_of_text` inside a document, or an `out_dir`
            that holds something else than shards.
    """
    if not 0 < vocab_size < 2**32:
        raise ValueError(f"vocab_size must be in 1 .. 2**32 - 1, got {vocab_size}")
    if not 0 <= end_of_text < vocab_size:
        raise ValueError(f"end_of_text must be an id below vocab_size {vocab_size}, got {end_of_text}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, got {shard_tokens}")
    target = Path(out_dir).resolve()
    if (
        target.exists()
        and not (target / MANIFEST).is_file()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise ValueError(f"{out_dir} exists and is no shard directory: remove it or choose another out_dir")
    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this id
    partial.mkdir(parents=True)
    writer = _ShardWriter(partial, vocab_size, end_of_text, shard_tokens)
    try:
        for number, document in enumerate(documents):
            writer.add_document(_checked(document, number, vocab_size, end_of_text))
        writer.finish()
        if not writer.shards:
            raise ValueError("documents are empty: there is nothing to write")
        manifest = {
            "format": _FORMAT,
            "version": _VERSION,
            "vocab_size": vocab_size,
            "end_of_text": end_of_text,
            "dtype": "uint16" if vocab_size <= 65536 else "uint32",
            "tokens": sum(shard["tokens"] for shard in writer.shards),
            "documents": sum(shard["documents"] for shard in writer.shards),
            "shards": writer.shards,
        }
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _replace_directory(partial, target)
    finally:
        writer.close()
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _checked(document: np.ndarray, number: int, vocab_size: int, end_of_text: int) -> np.ndarray:
    """The ids of a document with `end_of_text` as the last and nowhere else."""
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"document {number} must be a 1-D integer array, got {ids.dtype} of shape {ids.shape}"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = ids.max() if ids.max() >= vocab_size else ids.min()
        raise ValueError(f"document {number} has the id {wrong}, outside the vocabulary of {vocab_size}")
    if ids.size and ids[-1] == end_of_text:
        ids = ids[:-1]
    if np.any(ids == end_of_text):
        raise ValueError(f"document {number} has end_of_text ({end_of_text}) before its end: split it there")
    return np.append(ids.astype(np.uint32), np.uint32(end_of_text))


def _replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what was there is removed afterwards, or put back when renaming fails."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if not target.exists():
        source.rename(target)
        return
    target.rename(old)
    try:
        source.rename(target)
    finally:
        if not target.exists():
            old.rename(target)
    shutil.rmtree(old)


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """The manifest and the SHA-256 of its bytes."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} is no shard directory: it has no {MANIFEST}")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON") from error
    match manifest:
        case {
            "format": "tapelm-shards",
            "version": 1,
            "vocab_size": int(),
            "end_of_text": int(end_of_text),
            "tokens": int(),
            "documents": int(),
            "shards": [*shards],
        } if 0 <= end_of_text < 2**32 and all(_is_entry(shard) for shard in shards):
            return manifest, hashlib.sha256(content).hexdigest()
    raise ValueError(f"{path} is not a manifest of {_FORMAT} version {_VERSION}")


def _is_entry(shard: Any) -> bool:
    match shard:
        case {"file": str(name), "tokens": int(), "documents": int(), "sha256": str()}:
            return Path(name).name == name
    return False


def verify_shards(shards: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare every shard with its SHA-256 in the manifest, which is returned.

    Raises:
        ValueError: naming the shard that is missing or has changed.
    """
    directory = Path(shards)
    manifest, _ = read_manifest(directory)
    for entry in manifest["shards"]:
        path = directory / entry["file"]
        if not path.is_file():
            raise ValueError(f"shard {path} is missing")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"shard {path} is damaged: its SHA-256 is not that of the manifest")
    return manifest

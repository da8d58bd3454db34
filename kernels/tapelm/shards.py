"""Token shards on disk; the Python face of csrc/text/shards.h, which has the layout of a shard file.

A shard directory holds `shard-00000.bin`, ... and `manifest.json` with the counts of every shard, which are
those of its header, and the SHA-256 of all behind the header: tokens are hashed as they are written, and
counts are known at the end. The shards of a directory are one sequence of tokens in which every document ends
with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from tapelm import _text

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"  # of files that are being encoded
_FORMAT = "tapelm-shards"
_VERSION = 2
_START_BYTES = (
    1 << 21
)  # written before the disk is to begin with them, so that little is left to wait for at the end


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
                self._file = (self._directory / _file_name(len(self.shards))).open("wb")
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
            "format": _FORMAT,
            "version": _VERSION,
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


def _file_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def shard_header(vocab_size: int, end_of_text: int, tokens: int, documents: int) -> bytes:
    itemsize = token_dtype(vocab_size).itemsize
    return _text.shard_header(itemsize, tokens, documents, vocab_size, end_of_text)


def check_integers(**numbers: object) -> None:
    """Raises TypeError for the first that is none; NumPy's are some, True is not."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")


def check_settings(vocab_size: int, end_of_text: int, shard_tokens: int) -> None:
    if not 0 < vocab_size < 2**32:
        raise ValueError(f"vocab_size must be in 1 .. 2**32 - 1, got {vocab_size}")
    if not 0 <= end_of_text < vocab_size:
        raise ValueError(f"end_of_text must be an id below vocab_size {vocab_size}, got {end_of_text}")
    check_integers(shard_tokens=shard_tokens)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, got {shard_tokens}")


def strange_files(directory: Path) -> list[str]:
    """Names of what is in `directory` and is no part of shards, nor of shards that are being written."""
    ours = re.compile(rf"shard-\d{{5,}}\.bin|{re.escape(MANIFEST)}|{re.escape(JOURNAL)}")
    return sorted(
        path.name for path in directory.iterdir() if not ours.fullmatch(path.name) or not path.is_file()
    )


def replaceable(out_dir: str | os.PathLike[str]) -> Path:
    """`out_dir`, resolved; raises ValueError when it holds something else than shards."""
    target = Path(out_dir).resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir() or not _has_manifest(target):
        raise ValueError(f"{out_dir} exists and is no shard directory: remove it or choose another out_dir")
    if (target.parent / "data_card.json").is_file():
        raise ValueError(f"{out_dir} is part of the data that data.prepare made: choose another out_dir")
    if strange := strange_files(target):
        raise ValueError(
            f"{out_dir} holds {strange[0]}, which is no shard and would be lost: move it elsewhere"
        )
    return target


def _has_manifest(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == _FORMAT


def sibling(target: Path, kind: str) -> Path:
    """A path beside `target` that no other process or thread uses: NAME.KIND-1f2e3d4c."""
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(4)}")


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
    check_settings(vocab_size, end_of_text, shard_tokens)
    target = replaceable(out_dir)
    partial = sibling(target, "tmp")
    partial.mkdir(parents=True)
    writer = ShardWriter(partial, vocab_size, end_of_text, shard_tokens)
    begin = np.zeros(1, dtype=np.uint64)
    try:
        for number, document in enumerate(documents):
            writer.add(_checked(document, number, vocab_size, end_of_text), begin)
        manifest = writer.write_manifest()
        replace_directory(partial, target)
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


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what was there is removed afterwards, or put back when renaming fails.

    Warns when the old directory cannot be removed, and says where it is when that is interrupted: the new one
    is in its place all the same.
    """
    old = sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        source.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    try:
        if old.exists():
            shutil.rmtree(old)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{target} holds the new data, {old} the rest of the old") from error
    except OSError as error:
        warnings.warn(f"{old}, the data before, cannot be removed: {error}", stacklevel=2)


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """The manifest and the SHA-256 of its bytes."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{directory} is no shard directory: it has no {MANIFEST}")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON") from error
    match manifest:
        case {
            "format": "tapelm-shards",
            "version": 2,
            "vocab_size": int(vocab_size),
            "end_of_text": int(end_of_text),
            "tokens": int(tokens),
            "documents": int(documents),
            "shards": [_, *_] as shards,
        } if 0 <= end_of_text < vocab_size < 2**32 and all(map(_is_entry, shards, range(len(shards)))):
            if (tokens, documents) != tuple(sum(s[name] for s in shards) for name in ("tokens", "documents")):
                raise ValueError(f"{path} is damaged: its totals are not those of its shards")
            if manifest.get("dtype", expected := token_dtype(vocab_size).name) != expected:
                raise ValueError(f"{path} is damaged: vocab_size {vocab_size} is stored as {expected}")
            return manifest, hashlib.sha256(content).hexdigest()
    raise ValueError(f"{path} is not a manifest of {_FORMAT} version {_VERSION}: encode the text again")


def _is_entry(shard: Any, number: int) -> bool:
    match shard:
        case {"file": str(name), "tokens": int(tokens), "documents": int(documents), "sha256": str()}:
            return name == _file_name(number) and 0 <= tokens < 2**48 and 0 <= documents < 2**48
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
        counts = entry["tokens"], entry["documents"]
        expected = shard_header(manifest["vocab_size"], manifest["end_of_text"], *counts)
        with path.open("rb") as file:
            header = file.read(len(expected))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
        if header != expected or entry.get("bytes", size) != size:
            raise ValueError(f"shard {path} is damaged: its header is not what the manifest says")
        if digest != entry["sha256"]:
            raise ValueError(f"shard {path} is damaged: its SHA-256 is not that of the manifest")
    return manifest

"""Token shards on disk: documents written to them, their manifest read and checked.

A shard directory holds `shard-00000.bin`, ... and `manifest.json` with the counts of every shard, which are
those of its header, and the SHA-256 of all behind the header. The shards of a directory are one sequence of
tokens in which every document ends with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from tapelm._shard_folders import replace_directory, replaceable, sibling
from tapelm._shard_writer import (
    FORMAT,
    MANIFEST,
    VERSION,
    ShardWriter,
    shard_header,
    shard_name,
    token_dtype,
)


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


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """The manifest and the SHA-256 of its bytes."""
    path = directory / MANIFEST
    if not path.is_file():
        below = " and ".join(str(found.parent) for found in sorted(directory.glob(f"*/{MANIFEST}")))
        hint = f"; shards are in {below}" if below else ""
        raise ValueError(f"{directory} is no shard directory: it has no {MANIFEST}{hint}")
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
    raise ValueError(f"{path} is not a manifest of {FORMAT} version {VERSION}: encode the text again")


def _is_entry(shard: Any, number: int) -> bool:
    match shard:
        case {"file": str(name), "tokens": int(tokens), "documents": int(documents), "sha256": str()}:
            return name == shard_name(number) and 0 <= tokens < 2**48 and 0 <= documents < 2**48
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

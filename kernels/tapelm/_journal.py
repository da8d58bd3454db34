"""The journal of `encode_files`: which shards are finished, and where encoding goes on after them."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, TextIO

from tapelm._blocks import Position
from tapelm._shard_folders import JOURNAL, strange_files


def make_partial(partial: Path) -> None:
    """Create the directory; raises ValueError when there is one that is not of an earlier run."""
    partial.mkdir(parents=True, exist_ok=True)
    strange = strange_files(partial)
    if strange or (any(partial.iterdir()) and not (partial / JOURNAL).exists()):
        found = strange[0] if strange else f"no {JOURNAL}"
        raise ValueError(
            f"{partial} is needed for shards that are not finished, and holds {found}: move it elsewhere"
        )


def lock(journal: TextIO, partial: Path, out_dir: str | os.PathLike[str]) -> None:
    """Raises ValueError when another process has the journal, or has had it and moved it away."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.stat(partial / JOURNAL)
    except BlockingIOError as error:
        raise ValueError(f"another process is encoding to {os.fspath(out_dir)}: wait for it") from error
    except FileNotFoundError:
        there = None
    if there is None or not os.path.samestat(there, os.fstat(journal.fileno())):
        raise ValueError(f"another process has just encoded to {os.fspath(out_dir)}: look, or start again")


def append(journal: TextIO, record: dict[str, Any]) -> None:
    journal.write(json.dumps(record) + "\n")
    journal.flush()
    if "shard" in record:  # without one there is nothing that could be lost
        os.fsync(journal.fileno())


def read_journal(
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
        append(journal, key)
    shards = [record["shard"] for record in records[1:]]
    kept = {shard["file"] for shard in shards} | {JOURNAL}
    for path in partial.iterdir():
        if path.name not in kept:
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

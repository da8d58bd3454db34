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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tapelm._blocks import Encoding, Lines, Pieces, Position, read_blocks
from tapelm.shards import (
    JOURNAL,
    ShardWriter,
    check_settings,
    replace_directory,
    replaceable,
    strange_files,
)

OTHER_KINDS = (".csv", ".parquet", ".gz", ".zst")


def encode_files(
    encoding: Encoding, paths: list[Path], out_dir: str | os.PathLike[str], shard_tokens: int
) -> dict[str, Any]:
    """Encode `paths` into shards at `out_dir`; see `Tokenizer.encode_files`."""
    check_settings(encoding.vocab_size, encoding.end_of_text, shard_tokens)
    _check_kinds(paths)
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
    _make_partial(partial)
    kept = False
    with (partial / JOURNAL).open("a+", encoding="utf-8") as journal:
        _lock(journal, partial, out_dir)
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
            fcntl.flock(journal, fcntl.LOCK_UN)  # a child that was forked meanwhile has the file open, too
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
    encoders = ThreadPoolExecutor(cores)
    try:
        for block in read_blocks(paths, position, encoding.specials):
            written.append(in_order.expect())
            encoders.submit(in_order.encode, block, encoding, written[-1])
            if len(written) > 4 * cores:
                written.popleft().result()
        while written:
            written.popleft().result()
    except BaseException:
        in_order.stop()
        encoders.shutdown(cancel_futures=True)
        writer.close()
        raise
    encoders.shutdown()
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
        current = written
        try:
            encoded = (block.position, *block.encode(encoding))
            with self._lock:
                self._encoded[written] = encoded
            while (ready := self._next()) is not None:
                current = ready[0]
                self._write(*ready[1])
                with self._lock:
                    self._busy = False
                current.set_result(None)
        except BaseException as error:  # stays busy if it was writing
            current.set_exception(error)

    def stop(self) -> None:
        """Write nothing more than what is being written."""
        with self._lock:
            self._expected.clear()

    def _next(self) -> tuple[Future[None], tuple[Position, np.ndarray, np.ndarray]] | None:
        """What to write now, unless another thread is writing: that one comes back for it."""
        with self._lock:
            if self._busy or not self._expected or self._expected[0] not in self._encoded:
                return None
            self._busy = True
            written = self._expected.popleft()
            return written, self._encoded.pop(written)


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _check_kinds(paths: list[Path]) -> None:
    """Raises ValueError for what is no file of text or of JSON lines."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name its files")
        if path.suffix.lower() in OTHER_KINDS:
            raise ValueError(
                f"{path} is neither plain text nor .jsonl: unpack it, or let data.prepare read it, "
                f"which takes {', '.join(OTHER_KINDS)}, too"
            )


def _make_partial(partial: Path) -> None:
    """Create the directory; raises ValueError when there is one that is not of an earlier run."""
    partial.mkdir(parents=True, exist_ok=True)
    strange = strange_files(partial)
    if strange or (any(partial.iterdir()) and not (partial / JOURNAL).exists()):
        found = strange[0] if strange else f"no {JOURNAL}"
        raise ValueError(
            f"{partial} is needed for shards that are not finished, and holds {found}: move it elsewhere"
        )


def _lock(journal: TextIO, partial: Path, out_dir: str | os.PathLike[str]) -> None:
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

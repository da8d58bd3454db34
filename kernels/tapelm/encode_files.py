"""Files into token shards: streamed, on all cores, and continued where a killed run stopped.

One thread finds blocks of input, the C++ encoder (csrc/text/encode_files.h) turns one on every core into
tokens, and whichever core has the next one writes and hashes it. Shards grow in OUT.partial; its
journal.jsonl says for every finished shard where in the inputs encoding goes on after it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tapelm._blocks import Encoding, Lines, Pieces, Position, read_blocks
from tapelm._journal import append, lock, make_partial, read_journal
from tapelm._shard_folders import JOURNAL, replace_directory, replaceable
from tapelm._shard_writer import ShardWriter
from tapelm.shards import check_settings

OTHER_KINDS = (".csv", ".parquet", ".gz", ".zst")  # which data.prepare reads
UNCLEAR_KINDS = (".json", ".ndjson")
PACKED_KINDS = (".xz", ".bz2", ".zip", ".tar", ".7z")


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
        "version": 3,
        "inputs": inputs,
        "tokenizer_sha256": encoding.tokenizer_sha256,
        "end_of_text": encoding.end_of_text,
        "shard_tokens": shard_tokens,
    }
    make_partial(partial)
    kept = False
    with (partial / JOURNAL).open("a+", encoding="utf-8") as journal:
        lock(journal, partial, out_dir)
        try:
            shards, position, skip = read_journal(journal, partial, key)
            writer = _write(encoding, paths, partial, shard_tokens, journal, shards, position, skip)
            for path, before in zip(paths, inputs, strict=True):
                if _identity(path) != before:
                    raise ValueError(f"{path} changed while it was encoded: encode it again")
            manifest = writer.write_manifest()
            if manifest["tokens"] == manifest["documents"]:  # an end-of-text token each
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                raise ValueError(f"no text in {paths[0]}{more}: there is nothing to encode")
            replace_directory(partial, target)
            kept = True
            (target / JOURNAL).unlink()  # after the lock on it has kept others out of `partial`
        except ValueError:
            raise  # the inputs are at fault, so that no shard made of them is worth keeping
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
    current = (position, 0)  # of the block being written, and how many of its tokens were skipped
    left_out = skip

    def record(entry: dict[str, Any], used: int) -> None:
        append(journal, {"shard": entry, "position": asdict(current[0]), "skip": current[1] + used})

    writer = ShardWriter(partial, encoding.vocab_size, encoding.end_of_text, shard_tokens, shards, record)

    def write(position: Position, tokens: np.ndarray, starts: np.ndarray) -> None:
        nonlocal current, left_out
        # Blocks need not be those of the run that was killed: what it wrote may be several of them.
        skip = min(left_out, tokens.size)
        left_out -= skip
        current = (position, skip)
        writer.add(tokens[skip:], starts[np.searchsorted(starts, skip) :] - np.uint64(skip))

    try:
        _Pipeline(read_blocks(paths, position, encoding.specials), encoding, write).run()
    except BaseException:
        writer.close()
        raise
    return writer


class _Pipeline:
    """Encodes blocks on a thread for every core; whichever has the next one in order writes it, too.

    A thread of its own for writing, or for handing out blocks, would be one more than there are cores, and in
    the way of the others. Behind a block that fails nothing is written.
    """

    def __init__(
        self,
        blocks: Iterator[Lines | Pieces],
        encoding: Encoding,
        write: Callable[[Position, np.ndarray, np.ndarray], None],
    ) -> None:
        self._blocks = blocks
        self._encoding = encoding
        self._write = write
        self._cores = os.cpu_count() or 1
        self._reading = threading.Lock()  # held by the thread that takes the next block from the reader
        self._changed = threading.Condition()
        self._taken = 0  # blocks
        self._written = 0
        self._writing = False
        self._encoded: dict[int, tuple[Position, np.ndarray, np.ndarray]] = {}
        self._faults: dict[int, BaseException] = {}  # by number of the block

    def run(self) -> None:
        """Write all blocks; raises what the first of those that failed has raised."""
        threads = [threading.Thread(target=self._work) for _ in range(self._cores)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self._fail(-1, error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._faults:
            raise self._faults[min(self._faults)]

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            number, block = taken
            try:
                encoded = (block.position, *block.encode(self._encoding))
                with self._changed:
                    self._encoded[number] = encoded
                while (ready := self._next()) is not None:
                    number, encoded = ready
                    self._write(*encoded)
                    with self._changed:
                        self._written, self._writing = number + 1, False
                        self._changed.notify_all()
            except BaseException as error:
                self._fail(number, error)

    def _take(self) -> tuple[int, Lines | Pieces] | None:
        """The next block, once not too many wait to be written; None when there is none or one has failed."""
        with self._reading:
            with self._changed:
                self._changed.wait_for(lambda: self._faults or self._taken - self._written < 4 * self._cores)
                if self._faults:
                    return None
            try:
                block = next(self._blocks, None)
            except BaseException as error:
                self._fail(self._taken, error)
                return None
            self._taken += block is not None
            return None if block is None else (self._taken - 1, block)

    def _next(self) -> tuple[int, tuple[Position, np.ndarray, np.ndarray]] | None:
        """What to write now, unless another thread is writing: that one comes back for it."""
        with self._changed:
            if self._writing or self._faults or self._written not in self._encoded:
                return None
            self._writing = True
            return self._written, self._encoded.pop(self._written)

    def _fail(self, number: int, error: BaseException) -> None:
        with self._changed:
            self._faults[number] = error
            self._changed.notify_all()


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    kind = path.suffix.lower()  # a link may have another than what it points to, and is read by its own
    return [str(path.resolve()), kind, status.st_size, status.st_mtime_ns]


def _check_kinds(paths: list[Path]) -> None:
    """Raises ValueError for what is no file of text or of JSON lines."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a directory: name its files")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a file on disk: copy what it gives into one")
        if path.suffix.lower() in PACKED_KINDS:
            raise ValueError(f"{path} is neither plain text nor .jsonl: unpack it")
        if path.suffix.lower() in UNCLEAR_KINDS:
            raise ValueError(
                f"{path} would be read as plain text: call it .jsonl when every line is an object with a "
                '"text", and .txt when its JSON is what is to be encoded'
            )
        if path.suffix.lower() in OTHER_KINDS:
            raise ValueError(
                f"{path} is neither plain text nor .jsonl: unpack it, or let data.prepare read it, "
                f"which takes {', '.join(OTHER_KINDS)}, too"
            )

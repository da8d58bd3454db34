"""Runs that make shards: in order on all cores, killed and continued, and what is there is left alone."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapelm import _text, encode_files, shards
from tapelm._blocks import Encoding, Lines, Pieces, Position, read_blocks
from tapelm._shard_writer import ShardWriter
from tapelm.shards import verify_shards
from tapelm.tokenizer import Tokenizer
from tests.kernels.encode_files_cases import (
    END,
    SPACED,
    expected_of,
    prose,
    starts_of,
    tokens_of,
    trained,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return trained()


def test_the_first_of_two_faults_is_told(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the block that holds it takes longer than the one behind it."""
    encode, blocks = Lines.encode, encode_files.read_blocks

    def slow(block: Lines, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(0.05 if block.position.offset == 0 else 0.0)
        return encode(block, encoding)

    (tmp_path / "x.jsonl").write_bytes(b"{}\n" + b'{"text": 1}\n' * 3)
    monkeypatch.setattr(Lines, "encode", slow)
    monkeypatch.setattr(encode_files, "read_blocks", lambda *a: blocks(*a, block_bytes=1))
    with pytest.raises(ValueError, match="line 1 has no"):
        tokenizer.encode_files([tmp_path / "x.jsonl"], tmp_path / "out")


ENCODE = """
import sys, time
from pathlib import Path
from tapelm import encode_files, shards
from tapelm.tokenizer import Tokenizer

root = Path(sys.argv[1])
encode_files.BLOCK_BYTES, encode_files.PIECE_BYTES = 20_000, 3_000
encode_files.read_blocks.__defaults__ = (20_000, 3_000)
encoded = []
plain = encode_files.Pieces.encode
def slow(self, encoding):
    encoded.append(self.position.offset)
    time.sleep(float(sys.argv[2]))
    return plain(self, encoding)
encode_files.Pieces.encode = slow
tokenizer = Tokenizer.load(root / "tokenizer.json")
tokenizer.encode_files(sorted(root.glob("*.txt")), root / "out", shard_tokens=10_000)
print(len(encoded))
"""


# Dies when the second shard is complete but not yet in the journal.
KILLED = """
import os, signal, sys
from pathlib import Path
from tapelm import encode_files
from tapelm._shard_writer import ShardWriter
from tapelm.tokenizer import Tokenizer

root = Path(sys.argv[1])
encode_files.read_blocks.__defaults__ = (int(sys.argv[2]), int(sys.argv[3]))
finish = ShardWriter.finish
def killed(writer):
    if len(writer.shards) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(writer)
ShardWriter.finish = killed
tokenizer = Tokenizer.load(root / "tokenizer.json")
os.chdir(root)
tokenizer.encode_files([Path("a.txt")], "out", shard_tokens=int(sys.argv[4]))
"""


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process and not a fork: a child forked under ASan may wait for ever for its allocator."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(_text.__file__).parents[1])},
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_run_continues(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice: the shards are byte for byte those of one run, and none is made twice."""
    tokenizer.save(tmp_path / "tokenizer.json")
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(prose(number, 50_000).encode())
    whole = start_python(ENCODE, tmp_path, 0)
    out, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    blocks = int(out)
    expected = contents(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()

    journal = tmp_path / "out.partial" / "journal.jsonl"
    for finished_shards in (4, 9):
        process = start_python(ENCODE, tmp_path, 0.02)
        deadline = time.monotonic() + 60
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 1 + finished_shards:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "out").exists()
    with journal.open("a") as file:
        file.write('{"shard": {"fi')  # as a kill in the middle of a line would leave it
    finished = contents(tmp_path / "out.partial")
    stamps = {path: path.stat().st_mtime_ns for path in sorted(journal.parent.glob("*.bin"))[:9]}
    last = start_python(ENCODE, tmp_path, 0)
    out, errors = last.communicate(timeout=120)
    assert last.returncode == 0, errors
    assert contents(tmp_path / "out") == expected and len(finished) > 9
    done = 1 - 9 / (len(expected) - 1)
    assert int(out) <= done * blocks + 2, "finished shards were encoded again"
    for path, stamp in stamps.items():
        assert (tmp_path / "out" / path.name).stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out"]


def test_resumed_blocks_may_be_others(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run cuts plain text elsewhere, and may cut it to less than was written of one block."""
    sizes = (60_000, 20_000)
    monkeypatch.setattr(read_blocks, "__defaults__", sizes)
    monkeypatch.chdir(tmp_path)
    words = random.Random(5)
    source = Path("a.txt")
    source.write_text(
        "".join("the rate rose by 5 percent. " * words.randint(1, 20) + "\n" for _ in range(9000))
    )
    specials = [END.encode(), SPACED.encode()]
    end = 0
    for block in read_blocks([source], Position(), specials):
        size = sum(len(piece.content) for piece in block.pieces)
        again = next(iter(read_blocks([source], block.position, specials)))
        end += size
        if sum(len(piece.content) for piece in again.pieces) < size:
            break
    else:
        pytest.fail("no block of this text is cut otherwise when it is read again")
    shard_tokens = tokenizer.encode(source.read_text()[:end]).size
    tokenizer.encode_files([source], "expected", shard_tokens=shard_tokens)
    tokenizer.save(tmp_path / "tokenizer.json")
    killed = start_python(KILLED, tmp_path, *sizes, shard_tokens)
    _, errors = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, errors
    assert Path("out.partial").is_dir()
    tokenizer.encode_files([source], "out", shard_tokens=shard_tokens)
    assert np.array_equal(tokens_of(Path("out")), tokens_of(Path("expected")))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_written_in_order(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever block is slow: those behind it wait, and no more of them than a few for every core."""
    generator, lock, waiting, most = random.Random(seed), threading.Lock(), 0, 0
    encode, add = Pieces.encode, ShardWriter.add

    def slow(block: Pieces, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        nonlocal waiting, most
        time.sleep(generator.choice((0, 0, 0.001, 0.03)))
        with lock:
            waiting += 1
            most = max(most, waiting)
        return encode(block, encoding)

    def leave(writer: ShardWriter, ids: np.ndarray, starts: np.ndarray) -> None:
        nonlocal waiting
        with lock:
            waiting -= 1
        add(writer, ids, starts)

    monkeypatch.setattr(Pieces, "encode", slow)
    monkeypatch.setattr(ShardWriter, "add", leave)
    monkeypatch.setattr(encode_files.read_blocks, "__defaults__", (1, 1 << 19))
    texts = [prose(1000 * seed + number, 30) for number in range(150)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    tokenizer.encode_files([tmp_path / f"{number}.txt" for number in range(150)], tmp_path / "out")
    tokens, starts = expected_of(tokenizer, texts)
    assert tokens_of(tmp_path / "out").tolist() == tokens and starts_of(tmp_path / "out") == starts
    assert most <= 4 * (os.cpu_count() or 1) + 1


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_that_fails_is_noticed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """What fsync says of any shard reaches the caller, and the shards that were there stay."""
    source = tmp_path / "text.txt"
    source.write_bytes(b"old words. " * 1000)
    tokenizer.encode_files([source], tmp_path / "out")
    before = contents(tmp_path / "out")
    source.write_bytes(prose(0, 100_000).encode())
    calls, fsync = [0], os.fsync

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(shards.os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        tokenizer.encode_files([source], tmp_path / "out", shard_tokens=100_000)
    assert contents(tmp_path / "out") == before


def test_forked_children_encode_while_the_parent_does(tokenizer: Tokenizer) -> None:
    """What the parent's threads hold locked at the moment of the fork is of no concern to the child."""
    stop = threading.Event()

    def encode() -> None:
        while not stop.is_set():
            tokenizer.encode(b"")

    threads = [threading.Thread(target=encode) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            if (child := os.fork()) == 0:
                tokenizer.encode(b"the rate")
                os._exit(0)
            watchdog = threading.Timer(20, os.kill, (child, signal.SIGKILL))
            watchdog.start()
            status = os.waitpid(child, 0)[1]
            watchdog.cancel()
            assert status == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_file_under_another_kind_of_name_is_not_continued(tmp_path: Path) -> None:
    """A link called .jsonl to a file that is not: the one is read as lines, the other as text."""
    (tmp_path / "blob").write_text('{"text": "the rate"}\n' * 3000)
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "blob")
    assert encode_files._identity(tmp_path / "blob") != encode_files._identity(tmp_path / "x.jsonl")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Reading it could block for ever, also for Ctrl-C."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is not a file on disk"):
        encode_files._check_kinds([tmp_path / "pipe.txt"])  # which does not hang where it is not refused


def test_a_journal_of_something_else_is_not_continued(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"text": prose(n, 100)}) + "\n" for n in range(50)))
    tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
    expected = contents(tmp_path / "out")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "shard-00000.bin").write_bytes(b"other")
    entry = {"file": "shard-00000.bin", "tokens": 1, "documents": 1, "bytes": 5, "sha256": "0"}
    position = {"file": 0, "offset": 9, "line": 2, "inside": False}
    for key in ({"version": 1}, {"version": 0, "inputs": []}):
        lines = [json.dumps(key), json.dumps({"shard": entry, "position": position, "skip": 0})]
        (partial / "journal.jsonl").write_text("\n".join(lines) + "\n")
        tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
        assert contents(tmp_path / "out") == expected
        partial.mkdir()
    with (partial / "journal.jsonl").open("w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is encoding to"):
            tokenizer.encode_files([source], tmp_path / "out")


def cut_off(directory: Path) -> None:
    (directory / "shard-00002.bin").write_bytes(b"short")


def damage(line: bytes) -> Callable[[Path], object]:
    def write(directory: Path) -> None:
        with (directory / "journal.jsonl").open("ab") as journal:
            journal.write(line)

    return write


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (lambda directory: (directory / "shard-00002.bin").unlink(), 2),
        (cut_off, 2),
        (lambda directory: (directory / "shard-00009.bin").write_bytes(b"of an older run"), 5),
        (damage(b"{}\n"), 5),
        (damage(b"5\n"), 5),
        (damage(b"\xff\n"), 5),
        (damage(b"\0\0\n"), 5),
        (damage(b'{"shard": {"file": "../x", "bytes": 1}, "position": {}, "skip": 0}\n'), 5),
    ],
)
def test_a_damaged_partial_directory_is_continued_from_what_is_good(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], object],
    kept: int,
) -> None:
    source, out, partial = tmp_path / "x.jsonl", tmp_path / "out", tmp_path / "out.partial"
    source.write_text("".join(json.dumps({"text": prose(n, 100)}) + "\n" for n in range(80)))
    tokenizer.encode_files([source], out, shard_tokens=1000)
    expected = contents(out)
    finish = ShardWriter.finish

    def interrupted(writer: ShardWriter) -> None:
        if len(writer.shards) == 5:
            raise KeyboardInterrupt
        finish(writer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ShardWriter, "finish", interrupted)
        tokenizer.encode_files([source], out, shard_tokens=1000)
    stamps = [(partial / f"shard-{n:05d}.bin").stat().st_mtime_ns for n in range(5)]
    harm(partial)
    tokenizer.encode_files([source], out, shard_tokens=1000)
    assert contents(out) == expected and not partial.exists()
    assert [(out / f"shard-{n:05d}.bin").stat().st_mtime_ns for n in range(kept)] == stamps[:kept]


@pytest.mark.parametrize("name", ["thesis.txt", "shard-00000.bin", "folder/thesis.txt"])
def test_a_partial_directory_of_someone_else_is_left_alone(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "out.partial" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    (tmp_path / "x.txt").write_text(prose(1, 10))
    with pytest.raises(ValueError, match=r"out\.partial is needed .* move it elsewhere"):
        tokenizer.encode_files([tmp_path / "x.txt"], tmp_path / "out")
    assert path.read_text() == "years of work" and not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial", "x.txt"]


def test_the_splits_of_prepared_data_are_not_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(prose(1, 10))
    tokenizer.encode_files([tmp_path / "x.txt"], tmp_path / "data" / "train")
    (tmp_path / "data" / "data_card.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train is part of the data that data\.prepare made"):
        tokenizer.encode_files([tmp_path / "x.txt"], tmp_path / "data" / "train")


def test_a_run_that_ended_while_another_waited_is_noticed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text(prose(1, 10))
    lock = fcntl.flock

    def late(journal: object, how: int) -> None:
        if how & fcntl.LOCK_EX:
            (tmp_path / "out.partial").rename(tmp_path / "out")
            (tmp_path / "out" / "journal.jsonl").unlink()
        lock(journal, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="another process has just encoded to"):
        tokenizer.encode_files([tmp_path / "x.txt"], tmp_path / "out")


def test_nothing_is_written_after_an_interruption(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are on their way when Ctrl-C arrives do not reach the shards behind its back."""
    source, written = tmp_path / "x.jsonl", []
    source.write_text("".join(json.dumps({"text": prose(n, 100)}) + "\n" for n in range(200)))
    add, join, blocks = ShardWriter.add, threading.Thread.join, encode_files.read_blocks
    fail = encode_files._Pipeline._fail
    arrived, told = threading.Event(), threading.Event()

    def held(writer: ShardWriter, *block: np.ndarray) -> None:
        written.append(block)
        if len(written) == 10:
            arrived.set()
            assert told.wait(60)
        add(writer, *block)

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        assert arrived.wait(60)
        raise KeyboardInterrupt

    def failed(pipeline: Any, number: int, error: BaseException) -> None:
        fail(pipeline, number, error)
        told.set()

    monkeypatch.setattr(encode_files, "read_blocks", lambda *a: blocks(*a, block_bytes=1000))
    monkeypatch.setattr(encode_files._Pipeline, "_fail", failed)
    monkeypatch.setattr(ShardWriter, "add", held)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
    time.sleep(0.1)
    assert len(written) == 10, "the block that was being written, and none of those that were ready"
    monkeypatch.undo()
    manifest = tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
    assert manifest["documents"] == 200 and verify_shards(tmp_path / "out") == manifest

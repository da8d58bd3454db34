"""Files into shards: streaming is exact, killed runs continue, JSON is read as Python reads it."""

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

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapelm import _text, encode_files, shards
from tapelm._blocks import Encoding, Lines, Pieces, Position, read_blocks
from tapelm.shards import ShardWriter, verify_shards
from tapelm.tokenizer import Tokenizer

END = "<|endoftext|>"
SPACED = "<|end of text|>"
WORDS = [
    "the",
    "Fed's",
    "rate",
    "5.25%",
    "rose,",
    "—",
    "été",
    "中文。",
    "it'll",
    "x_1",
    "\u00a0",
    "／",
    "a/b",
    "'",
    "!!",
]
GAPS = [" ", " ", " ", "\n", "\n\n", "  ", "\r\n", " \n", "\t", "\u3000", "\n/", "\x0b", "", "\u2028"]


def prose(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return "".join(generator.choice(WORDS) + generator.choice(GAPS) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([prose(seed, 3000) for seed in range(3)], 600, (END, SPACED))


def tokens_of(directory: Path) -> np.ndarray:
    manifest = verify_shards(directory)
    files = [(directory / entry["file"], entry["tokens"]) for entry in manifest["shards"]]
    return np.concatenate([np.fromfile(path, manifest["dtype"], count, offset=64) for path, count in files])


def starts_of(directory: Path) -> list[int]:
    manifest, starts, before = verify_shards(directory), [], 0
    for entry in manifest["shards"]:
        content = (directory / entry["file"]).read_bytes()
        found = np.frombuffer(content[len(content) - 8 * entry["documents"] :], np.uint64)
        starts += (found + np.uint64(before)).tolist()
        before += entry["tokens"]
    return starts


def expected_of(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(tokens))
        tokens += [*tokenizer.encode(text).tolist(), tokenizer.special_tokens[END]]
    return tokens, starts


@pytest.mark.parametrize("shard_tokens", [1000, 7777, 2**26])
def test_shards_hold_every_document(tokenizer: Tokenizer, tmp_path: Path, shard_tokens: int) -> None:
    texts = [prose(seed, 400 * seed) for seed in range(9)]
    paths = []
    for number, text in enumerate(texts[:6]):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_bytes(text.encode())
    paths.insert(3, tmp_path / "more.jsonl")
    paths[3].write_text("".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts[6:]).rstrip("\n"))
    tokenizer.encode_files(iter(paths), tmp_path / "out", shard_tokens=shard_tokens)
    tokens, starts = expected_of(tokenizer, texts[:3] + texts[6:] + texts[3:6])
    assert tokens_of(tmp_path / "out").tolist() == tokens
    assert starts_of(tmp_path / "out") == starts
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "journal.jsonl").exists()


@pytest.mark.parametrize("kind", [_text.GPT2, _text.LLAMA3, _text.GPT2_DIGITS])
def test_cuts_do_not_change_words(kind: int) -> None:
    """Words of the two sides of every cut are those of the whole."""
    cuts = 0
    for seed in range(400):
        text = prose(seed, 30).encode()
        lengths = np.cumsum(_text.word_lengths(text, kind)).tolist()
        for stop in range(1, len(text) + 1):
            cut = _text.safe_cut(text[:stop], [])
            if not cut:
                continue
            cuts += 1
            left = np.cumsum(_text.word_lengths(text[:cut], kind)).tolist()
            assert left == [end for end in lengths if end <= cut], (text, cut)
            if stop == len(text):
                right = (np.cumsum(_text.word_lengths(text[cut:], kind)) + cut).tolist()
                assert left + right == lengths, (text, cut)
    assert cuts > 1000


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000])
def test_streaming_is_exact(tokenizer: Tokenizer, tmp_path: Path, piece_bytes: int) -> None:
    texts = [prose(11, 600), "", "中" * 3000 + "\n" + "文" * 10, "x" * 5000, " " * 700 + "y", "a\n"]
    paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    ids: list[int] = []
    documents = 0
    for block in read_blocks(paths, Position(), [END.encode()], 200, piece_bytes):
        tokens, starts = _text.encode_pieces(
            tokenizer._bpe,
            [piece.content for piece in block.pieces],  # type: ignore[union-attr]
            [piece.place for piece in block.pieces],  # type: ignore[union-attr]
            [piece.ends for piece in block.pieces],  # type: ignore[union-attr]
            block.position.inside,
            tokenizer.special_tokens[END],
            2,
        )
        ids += tokens.tolist()
        documents += len(starts)
    assert ids == expected_of(tokenizer, texts)[0] and documents == len(texts)


@pytest.mark.parametrize("block_bytes", [1, 10, 100, 10_000])
def test_lines_are_whole(tmp_path: Path, block_bytes: int) -> None:
    content = b"".join(b"%d" % n * (n % 40) + b"\n" for n in range(200)) + b"last"
    (tmp_path / "x.jsonl").write_bytes(content)
    blocks = list(read_blocks([tmp_path / "x.jsonl"], Position(), [], block_bytes))
    assert sum(block.size for block in blocks) == len(content)  # type: ignore[union-attr]
    end = 0
    for block in blocks:
        assert block.position.offset == end
        assert content[:end].endswith(b"\n") or end == 0
        end += block.size  # type: ignore[union-attr]


def test_special_tokens_are_found_across_pieces(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A special token with a space in it is never cut, so that it is always refused."""
    specials = [token.encode() for token in tokenizer.special_tokens]
    for before in range(60):
        (tmp_path / "x.txt").write_text("ab " * before + SPACED + " c" * 60)
        pieces = list(read_blocks([tmp_path / "x.txt"], Position(), specials, 50, 50))
        assert any(SPACED.encode() in piece.content for block in pieces for piece in block.pieces)  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"x\.txt: text contains the special token <|end of text|>"):
            tokenizer.encode_files([tmp_path / "x.txt"], tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def python_reads(line: bytes) -> str | None:
    try:
        document = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    return text


def ours_reads(line: bytes) -> str | None:
    try:
        return _text.text_field(line)
    except ValueError:
        return None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.just("text"), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(JSON_VALUES, st.booleans(), st.integers(0, 200), st.binary(max_size=3), st.booleans())
@example({"text": "a"}, True, 0, b"", False)
def test_json_is_read_as_python_reads_it(
    value: object, ascii_only: bool, at: int, damage: bytes, nested: bool
) -> None:
    """Whole lines, and lines with some bytes overwritten."""
    document = {"a": value, "text": "v\n\u20ac\U0001f600"} if nested else value
    line = json.dumps(document, ensure_ascii=ascii_only).encode()
    assert ours_reads(line) == python_reads(line)
    damaged = line[:at] + damage + line[at + len(damage) :]
    assert ours_reads(damaged) == python_reads(damaged)


@pytest.mark.parametrize(
    "line",
    [
        rb'{"text": "\ud83d\ude00 \u00e9 \\ \/ \" \b\f\n\r\t"}',
        rb'{"\u0074ext": "x"}',
        b'{"text": 1, "text": "last"}',
        b'{"text": "first", "text": 1}',
        rb'{"text": "\ud83d"}',
        rb'{"text": "\ud83d\u0041"}',
        rb'{"text": "\ud83d\ud83d\ude00"}',
        rb'{"other": "\ud83d", "text": "fine"}',
        rb'{"te\ud800xt": "a"}',
        rb'{"text": "real", "text\udfff": "other"}',
        b'{"text": "a\tb"}',
        b'{"text": "a"} x',
        b'{"text": "a",}',
        b'{"text": "\xff"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xc0\x80"}',
        b' {"a": [1, -0.5e+3, NaN, -Infinity, {"text": "no"}], "text": ""} \r',
        b'{"a": 01, "text": ""}',
        b'{"a": 1., "text": ""}',
        b'{"a": .5, "text": ""}',
        b'{"a": -, "text": ""}',
        b'{"a": tru, "text": ""}',
        b'{text: ""}',
        b"[]",
        b'"text"',
        b"{",
        b"",
        b'{"text": "\\',
        b'{"text": "\\u12',
        b'{"text": "\\x"}',
    ],
)
def test_json_corners(line: bytes) -> None:
    assert ours_reads(line) == python_reads(line)


def test_deep_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="nests too deeply"):
        _text.text_field(b'{"a": ' + b"[" * 10**6)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("b.jsonl", b'{"text": "a"}\n\n', r"b\.jsonl, line 2 is not valid JSON"),
        ("b.jsonl", b'{"text": "a"}\n' * 500 + b'{"text": 5}', r"b\.jsonl, line 501 has no"),
        ("b.jsonl", b'{"text": "a"}\n' * 200_000 + b"5", r"b\.jsonl, line 200001 has no"),
        ("b.jsonl", b'{"text": "\xff"}', r"b\.jsonl, line 1 is not UTF-8 at its byte 10"),
        ("b.jsonl", b'{"text": "\\ud800"}', r"b\.jsonl, line 1 contains a lone surrogate"),
        ("b.txt", b"ab " * 400_000 + b"\xff", r"b\.txt, from byte \d+ is not UTF-8: invalid at byte \d+"),
    ],
)
def test_faults_are_named(
    tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        tokenizer.encode_files([tmp_path / name], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(FileNotFoundError):
        tokenizer.encode_files([tmp_path / "missing.txt"], tmp_path / "out")
    with pytest.raises(TypeError, match="iterable of paths"):
        tokenizer.encode_files(str(tmp_path / name), tmp_path / "out")


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


def start_encoding(root: Path, delay: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", ENCODE, str(root), str(delay)],
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
    whole = start_encoding(tmp_path, 0)
    out, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    blocks = int(out)
    expected = contents(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    (tmp_path / "out").rmdir()

    journal = tmp_path / "out.partial" / "journal.jsonl"
    for finished_shards in (4, 9):
        process = start_encoding(tmp_path, 0.02)
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
    last = start_encoding(tmp_path, 0)
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
    if (child := os.fork()) == 0:
        finish = ShardWriter.finish

        def killed(writer: ShardWriter) -> None:
            if len(writer.shards) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            finish(writer)

        monkeypatch.setattr(ShardWriter, "finish", killed)
        tokenizer.encode_files([source], "out", shard_tokens=shard_tokens)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and Path("out.partial").is_dir()
    tokenizer.encode_files([source], "out", shard_tokens=shard_tokens)
    assert np.array_equal(tokens_of(Path("out")), tokens_of(Path("expected")))


@pytest.mark.parametrize("end", ["。", "」", "…", "—", "”", "é", "x"])
def test_lines_that_end_in_any_character_are_cut(tokenizer: Tokenizer, tmp_path: Path, end: str) -> None:
    """No white space but line ends: only at these can the text be cut, and the pieces are as many."""
    source = tmp_path / "a.txt"
    source.write_text(f"中文中文中文{end}\n" * 3000, encoding="utf-8")
    blocks = list(read_blocks([source], Position(), [END.encode()], 9000, 3000))
    assert len(blocks) > 5
    ids = [tokenizer.encode(piece.content) for block in blocks for piece in block.pieces]
    assert np.array_equal(np.concatenate(ids), tokenizer.encode(source.read_text(encoding="utf-8")))


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


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl.zst", "a.txt.gz", "a.parquet", "a.zip", "a.txt.XZ", "folder"]
)
def test_other_kinds_of_files_are_refused_before_anything_is_made(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{name} is (neither plain text nor|a directory)"):
        tokenizer.encode_files([path], tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


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

    def slow(writer: ShardWriter, *block: np.ndarray) -> None:
        time.sleep(0.01)
        written.append(time.monotonic())
        add(writer, *block)

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "join", join)
        while len(written) < 10:
            time.sleep(0.001)
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_files, "read_blocks", lambda *a: blocks(*a, block_bytes=1000))
    monkeypatch.setattr(ShardWriter, "add", slow)
    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
    ended = time.monotonic()
    time.sleep(0.1)
    assert max(written) <= ended and len(written) < 30
    monkeypatch.undo()
    manifest = tokenizer.encode_files([source], tmp_path / "out", shard_tokens=1000)
    assert manifest["documents"] == 200 and verify_shards(tmp_path / "out") == manifest


@pytest.mark.slow
def test_more_than_two_gibibytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A sparse file of 2.2 GB, NUL bytes between some text; offsets need more than 31 bits."""
    source, size = tmp_path / "big.txt", 2_200_000_000
    with source.open("wb") as file:
        file.write(b"begin ")
        for at in range(50_000_000, size, 50_000_000):
            file.seek(at)
            file.write(b"the rate\n")
        file.truncate(size)
    code = (
        "import resource, sys; from tapelm.tokenizer import Tokenizer; "
        "t = Tokenizer.load(sys.argv[1]); m = t.encode_files([sys.argv[2]], sys.argv[3]); "
        "print(m['tokens'], m['documents'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / n) for n in ("tokenizer.json", "big.txt", "out"))],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(_text.__file__).parents[1])},
        check=True,
    )
    tokens, documents, kilobytes = map(int, done.stdout.split())
    words = len(range(50_000_000, size, 50_000_000))
    assert documents == 1 and kilobytes < 4_000_000
    assert tokens > size - 20 * words, "NUL has no merges: one token per byte"
    os.remove(source)

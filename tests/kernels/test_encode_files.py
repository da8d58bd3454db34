"""Files into shards: streaming is exact, and JSON is read as Python reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tapelm import _text
from tapelm._blocks import Position, read_blocks
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


@pytest.mark.parametrize("end", ["。", "」", "…", "—", "”", "é", "x"])
def test_lines_that_end_in_any_character_are_cut(tokenizer: Tokenizer, tmp_path: Path, end: str) -> None:
    """No white space but line ends: only at these can the text be cut, and the pieces are as many."""
    source = tmp_path / "a.txt"
    source.write_text(f"中文中文中文{end}\n" * 3000, encoding="utf-8")
    blocks = list(read_blocks([source], Position(), [END.encode()], 9000, 3000))
    assert len(blocks) > 5
    ids = [tokenizer.encode(piece.content) for block in blocks for piece in block.pieces]
    assert np.array_equal(np.concatenate(ids), tokenizer.encode(source.read_text(encoding="utf-8")))


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
        ("b.jsonl", b'{"text": "a"}\n\n', r"b\.jsonl, line 2 is empty: remove it"),
        ("b.jsonl", b'{"text": "a"}\n' * 500 + b'{"text": 5}', r"b\.jsonl, line 501 has no"),
        ("b.jsonl", b'{"text": "a"}\n' * 200_000 + b"5", r"b\.jsonl, line 200001 has no"),
        ("b.jsonl", b'{"text": "\xff"}', r"b\.jsonl, line 1 is not UTF-8 at its byte 10"),
        ("b.jsonl", b'{"text": "<|endoftext|>"}', r"line 1: text contains .* at byte 0: remove it"),
        ("b.jsonl", b'{"text": "\\ud800"}', r"b\.jsonl, line 1 contains a lone surrogate"),
        ("b.txt", b"", r"no text in \S*b\.txt: there is nothing to encode"),
        ("b.jsonl", b'{"text": ""}\n' * 3, r"no text in \S*b\.jsonl"),
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


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl.zst", "a.txt.gz", "a.parquet", "a.zip", "a.txt.XZ", "folder", "a.json"]
)
def test_other_kinds_of_files_are_refused_before_anything_is_made(
    tokenizer: Tokenizer, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"x")
    with pytest.raises(
        ValueError, match=rf"{name} (is neither plain text nor|is a directory|would be read as)"
    ):
        tokenizer.encode_files([path], tmp_path / "out")
    with pytest.raises(TypeError, match="shard_tokens must be an integer"):
        tokenizer.encode_files([path], tmp_path / "out", shard_tokens=1e6)  # type: ignore[arg-type]
    assert not (tmp_path / "out.partial").exists()


def test_lines_may_be_named_in_capitals(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "the rate"}\n')
    tokenizer.encode_files([tmp_path / "A.JSONL"], tmp_path / "out")
    assert tokens_of(tmp_path / "out").tolist() == expected_of(tokenizer, ["the rate"])[0]


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

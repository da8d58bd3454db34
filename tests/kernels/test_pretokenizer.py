"""Word cutting against the published regular expressions, run by the `regex` module."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import unicodedata
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import regex

from tapelm import _text
from tapelm._tokenizer_json import GPT2_PATTERN, LLAMA3_PATTERN
from tapelm.tokenizer import Tokenizer

UPPER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
LOWER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    _text.GPT2: regex.compile(GPT2_PATTERN),
    _text.LLAMA3: regex.compile(LLAMA3_PATTERN),
    _text.O200K: regex.compile(O200K_PATTERN),
}
KINDS = list(PATTERNS)
# Every class, case and contraction, several times where it matters, and what only looks like one.
ALPHABET = [*"abzABZ019 \t\n\r'stremvldSTREMVLD.,!/-", "  ", "\n\n", "'s", "'LL", "'re", "é", "Ö", "ß"]
ALPHABET += [
    "ǅ",
    "ʰ",
    "日",
    "א",
    "\u0301",
    "\u20dd",
    "ा",
    "²",
    "Ⅷ",
    "٣",
    "\u00a0",
    "\u3000",
    "\u2028",
    "€",
    "🚀",
    "ſ",
]


def words(text: str, kind: int) -> list[str]:
    raw = text.encode()
    ends = [0, *accumulate(_text.word_lengths(raw, kind))]
    return [raw[begin:end].decode() for begin, end in pairwise(ends)]


def unlike(kind: int, text: str) -> bool:
    return words(text, kind) != PATTERNS[kind].findall(text)


def strings(seed: int, count: int) -> list[str]:
    random_ = random.Random(seed)
    ascii_only = [piece for piece in ALPHABET if piece.isascii()]
    return [
        "".join(random_.choices(random_.choice((ALPHABET, ascii_only)), k=random_.randint(0, 90)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_random_strings_are_cut_as_published(kind: int) -> None:
    wrong = [text for text in strings(kind, 3000) if unlike(kind, text)]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_random_strings(kind: int) -> None:
    wrong = [text for text in strings(100 + kind, 100_000) if unlike(kind, text)]
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_is_cut_as_published(kind: int) -> None:
    """Among letters, digits, spaces and others; without those that Python does not know, being new."""
    known = (c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs"))
    # U+0295 is lower case in Unicode 16, whose tables we have, and without case in the 17 of `regex`.
    texts = (f"a{c}b {c}7{c}! {c}\n{c}A{c}{c}" for c in known if c not in "|\u0295")
    text = " |\n".join(texts)
    assert not unlike(kind, text)


@pytest.mark.parametrize("offset", range(0, 130))
def test_blocks_do_not_show(offset: int) -> None:
    """The masks work on 64 bytes at a time: what is at their borders is cut as elsewhere."""
    for piece in ("'s", "'ll", "'lx", " 's", "\n x", " \n", "x  ", "é", "\u00a0 ", "'re'd", "7'tt", "'"):
        for filler in ("a", " ", ".", "1 "):
            text = (filler * 130)[:offset] + piece
            assert not unlike(_text.GPT2, text), text
            assert not unlike(_text.GPT2, text + "b c" * 30), text


@pytest.mark.parametrize("kind", [_text.GPT2, _text.LLAMA3, _text.GPT2_DIGITS, _text.O200K])
def test_bytes_that_are_not_utf8(kind: int) -> None:
    """Any bytes are cut into words that cover them; an invalid byte acts like a symbol."""
    random_ = random.Random(kind)
    for _ in range(2000):
        raw = bytes(
            random_.choices(b"ab '\n0\xc3\xa9\xe6\x97\xff\x80\xed\xa0\xf4\x90", k=random_.randint(1, 100))
        )
        assert sum(_text.word_lengths(raw, kind)) == len(raw)
    assert _text.word_lengths(b"the\xff\xfe the", kind)[:2] == _text.word_lengths(b"the!! the", kind)[:2]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_long_text_is_the_same_on_every_number_of_threads(threads: int) -> None:
    """Long enough to be divided; ids must be those of the words encoded one by one."""
    tokenizer = Tokenizer.train(strings(7, 300), 600)
    text = "".join(strings(8, 25_000)).replace("<|", "")
    expected = {word: tokenizer.encode(word) for word in set(PATTERNS[_text.GPT2].findall(text))}
    ids = np.concatenate([expected[word] for word in PATTERNS[_text.GPT2].findall(text)])
    assert len(text.encode()) > 1_000_000
    batch = tokenizer.encode_batch([text, "", text], threads=threads)
    assert [part.size for part in batch] == [ids.size, 0, ids.size]
    assert np.array_equal(batch[0], ids) and np.array_equal(batch[2], ids)


def test_the_first_fault_of_a_batch_is_the_one_reported() -> None:
    tokenizer = Tokenizer.train(["some words"], 300)
    long = "words and words " * 40_000
    for threads in (1, 2):
        with pytest.raises(ValueError, match=f"at byte {len(long)}"):
            tokenizer.encode_batch([long + "<|endoftext|>", "<|endoftext|>"], threads=threads)


def test_many_different_words_overflow_no_cache() -> None:
    """More words than the cache holds at first, of every length around its limits."""
    tokenizer = Tokenizer.train(strings(9, 300), 700)
    random_ = random.Random(9)
    pieces = ["".join(random_.choices("abcdefgh", k=1 + i % 40)) for i in range(20_000)]
    once = [tokenizer.encode(piece) for piece in pieces]
    again = tokenizer.encode_batch(pieces, threads=1)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert tokenizer.decode(np.concatenate(again)) == "".join(pieces)


@pytest.mark.parametrize("lower", ["generic", "avx2"])
def test_every_instruction_set_gives_the_same_ids(tmp_path: Path, lower: str) -> None:
    """This process uses what the CPU has, the other one less."""
    texts = [*strings(10, 3000), " ".join(strings(11, 2000)), *("word " * n for n in range(1, 40))]
    Tokenizer.train(texts, 700).save(tmp_path / "tokenizer.json")
    (tmp_path / "texts").write_bytes(b"\xff".join(text.encode() for text in texts))
    code = """
import hashlib, pathlib, sys
from tapelm.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1] + "/tokenizer.json")
for text in pathlib.Path(sys.argv[1], "texts").read_bytes().split(b"\\xff"):
    print(hashlib.sha256(tokenizer.encode(text, allow_special=True)).hexdigest())
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"TAPELM_ISA": lower, "PYTHONPATH": str(Path(_text.__file__).parents[1])},
        timeout=120,
        check=True,
    )
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    ids = [tokenizer.encode(text, allow_special=True) for text in texts]
    assert run.stdout.split() == [hashlib.sha256(one).hexdigest() for one in ids]

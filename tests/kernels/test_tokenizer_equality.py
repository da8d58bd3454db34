"""Ids equal to those of Hugging Face `tokenizers` and of tiktoken; the long runs are slow tests."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace

from tapelm import _text
from tapelm.tokenizer import Tokenizer
from tests.kernels.tokenizer_cases import (
    CORPORA,
    END,
    TIKTOKEN_PATTERNS,
    corpus_texts,
    encoding,
    finance_text,
    rank_file,
    tokens_of,
    train_hugging_face,
)

ALL_CHARACTERS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
NAMES = ("beige-book.jsonl.gz", "fomc-minutes.jsonl.gz")
PIECES = [
    *"etaoinshrdlu ETAOIN 0123456789.,;:!?-%$()'\"/\n\r\t",
    *(" the", " of", "ing", "n't", "'s", "'LL", "'ſ", "  ", "\r\n", "\n\n", " \n", "$1,000.25", "2026-11-24"),
    *(
        "é",
        "ß",
        "ÖP",
        "日本",
        "銀行",
        "ความ",
        "हिन्दी",
        "한국",
        "👩‍🚀",
        "\u0301",
        "½",
        "Ⅷ",
        "١٢",
        "\u00a0",
        "\u3000",
        "\u2028",
    ),
    *("<|", "|>", "endoftext", "\0", "\x85", "\ufeff", "\u200b", "\U000e0001"),
]
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason="the shared corpora are not here")


class Peers:
    """One vocabulary in three tokenizers; Hugging Face's reads the file that we write."""

    def __init__(self, directory: Path, tokens: list[bytes], pretokenizer: str) -> None:
        path = directory / "test.tiktoken"
        path.write_bytes(rank_file(tokens))
        specials = {END: len(tokens)}
        self.ours = Tokenizer.load(path, pretokenizer=pretokenizer, special_tokens=specials)
        self.ours.save(directory / "tokenizer.json")
        self.hugging_face = HuggingFace.from_file(str(directory / "tokenizer.json"))
        self.tiktoken: tiktoken.Encoding = encoding(tokens, pretokenizer, specials)

    def check(self, texts: list[str], *, hugging_face: bool = True) -> None:
        ours = [ids.tolist() for ids in self.ours.encode_batch(texts, threads=2)]
        theirs = self.tiktoken.encode_ordinary_batch(texts, num_threads=2)
        for text, mine, ids in zip(texts, ours, theirs, strict=True):
            assert mine == ids, f"not the ids of tiktoken: {text[:200]!r}"
            assert self.ours.decode_bytes(mine) == text.encode()
        if hugging_face:
            for text, mine, peer in zip(texts, ours, self.hugging_face.encode_batch_fast(texts), strict=True):
                assert mine == peer.ids, f"not the ids of tokenizers: {text[:200]!r}"


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return tokens_of(Tokenizer.train([finance_text(1, 3000), "".join(PIECES) * 9], 1400))


@pytest.fixture(scope="module", params=TIKTOKEN_PATTERNS)
def peers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes]
) -> Peers:
    return Peers(tmp_path_factory.mktemp("peers"), tokens, request.param)


def random_texts(seed: int, count: int) -> list[str]:
    """Half of common and treacherous pieces, half of any characters."""
    random_ = random.Random(seed)
    assigned = [c for c in ALL_CHARACTERS if unicodedata.category(c) not in ("Cn", "Co")]
    alphabets = (PIECES, PIECES, assigned, assigned[:0x500])
    texts = (
        "".join(random_.choices(random_.choice(alphabets), k=random_.randint(0, 40))) for _ in range(count)
    )
    return [text for text in texts if END not in text]


def test_every_code_point(peers: Peers) -> None:
    """Alone, between letters, after a blank and before a number, after an apostrophe."""
    peers.check(ALL_CHARACTERS[:0x3000])
    for start in range(0, len(ALL_CHARACTERS), 2000):
        part = ALL_CHARACTERS[start : start + 2000]
        # Where all are of one category, mostly private or unassigned, a sample will do.
        uniform = len({unicodedata.category(c) for c in part}) == 1
        sample = part[:: 40 if uniform else 1]
        texts = ["".join(form.format(c) for c in sample) for form in ("a{}b", " {}1", "'{} ", "{}")]
        peers.check(texts, hugging_face=False)


def test_random_strings(peers: Peers) -> None:
    peers.check(random_texts(7, 4000))


@pytest.mark.slow
def test_100_000_random_strings(peers: Peers) -> None:
    for seed in range(10):
        peers.check(random_texts(100 + seed, 10_000))


def test_hypothesis_strings(peers: Peers) -> None:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(texts=st.lists(st.text(max_size=30).filter(lambda text: END not in text), max_size=8))
    def check(texts: list[str]) -> None:
        assigned = [text for text in texts if all(unicodedata.category(c) != "Cn" for c in text)]
        peers.check(assigned)

    check()


@pytest.mark.parametrize("unit", ["a", "e", " ", "\n", "9", "!", "é", "日", "🚀", " the", "\r\n"])
def test_a_million_repeats(peers: Peers, unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    ids = peers.ours.encode(text)
    assert peers.ours.decode_bytes(ids) == text.encode()
    peers.check([unit * 20_000, unit * 99, unit * 100, unit * 101])


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["a", " ", "9", "!", "é"])
def test_a_million_repeats_have_the_ids_of_peers(peers: Peers, unit: str) -> None:
    text = unit * 1_000_000
    ids = peers.ours.encode(text).tolist()
    assert ids == peers.hugging_face.encode(text).ids
    try:
        theirs = peers.tiktoken.encode_ordinary(text)
    except BaseException as error:
        # The stack of its engine overflows on white space, which is no Exception but a panic of Rust.
        assert type(error).__name__ == "PanicException" and unit == " "
    else:
        assert ids == theirs


def test_empty(peers: Peers) -> None:
    peers.check(["", ""])
    assert peers.ours.encode(b"").tolist() == []


@pytest.mark.parametrize("pretokenizer", TIKTOKEN_PATTERNS)
@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc3", b"\xe6\x97", b"\xf0\x9f\x9a", b"\xed\xa0\x80", b"\xc0\xaf"]
)
def test_bytes_that_are_no_character_split_like_symbols(pretokenizer: str, bad: bytes) -> None:
    kinds = {"gpt2": _text.GPT2, "llama3": _text.LLAMA3, "digits": _text.GPT2_DIGITS, "o200k": _text.O200K}
    kind = kinds[pretokenizer]
    random_ = random.Random(8)
    for _ in range(300):
        parts = ["".join(random_.choices(PIECES, k=random_.randint(0, 8))).encode() for _ in range(4)]
        symbols = b"^" * len(bad)
        expected = _text.word_lengths(symbols.join(parts), kind)
        assert _text.word_lengths(bad.join(parts), kind) == expected


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(content=st.binary(max_size=60))
@example(content=f"a{END}".encode())  # hypothesis takes such from the sources, in some runs
def test_any_bytes_come_back(peers: Peers, content: bytes) -> None:
    ids = peers.ours.encode(content, allow_special=True)
    assert peers.ours.decode_bytes(ids) == content
    assert peers.tiktoken.decode_bytes(ids.tolist()) == content


def test_special_token_text(peers: Peers) -> None:
    text = f"a{END}{END} b{END[:-1]}{END}"
    ids = peers.ours.encode(text, allow_special=True).tolist()
    assert ids == peers.tiktoken.encode(text, allowed_special="all") == peers.hugging_face.encode(text).ids
    for refused in (peers.ours.encode, peers.tiktoken.encode):
        with pytest.raises(ValueError, match="special token"):
            refused(text)


@needs_corpora
@pytest.mark.slow
@pytest.mark.parametrize("pretokenizer", TIKTOKEN_PATTERNS)
def test_corpora(tmp_path: Path, pretokenizer: str) -> None:
    """All documents of both corpora, with a vocabulary of one of them."""
    tokens = tokens_of(Tokenizer.train(corpus_texts(NAMES[1]), 16_000))
    peers = Peers(tmp_path, tokens, pretokenizer)
    for name in NAMES:
        peers.check(list(corpus_texts(name)))


@needs_corpora
@pytest.mark.slow
def test_training_32768_on_the_corpora_equals_hugging_face(tmp_path: Path) -> None:
    texts = [text for name in NAMES for text in corpus_texts(name)]
    Tokenizer.train(texts, 32_768).save(tmp_path / "tokenizer.json")
    ours = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    theirs = json.loads(train_hugging_face(texts, 32_768).to_str())["model"]
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]

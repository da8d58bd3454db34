"""The tokenizer against Hugging Face `tokenizers`: merges, ids, files; round trips and refusals."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace

from tapelm import _text
from tapelm._tokenizer_json import PRE_TOKENIZERS
from tapelm.shards import verify_shards
from tapelm.tokenizer import Tokenizer
from tests.kernels.tokenizer_cases import CORPORA, END, corpus_texts, finance_text, train_hugging_face

ALL_CHARACTERS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
ASSIGNED = [character for character in ALL_CHARACTERS if unicodedata.category(character) not in ("Cn", "Co")]
LLAMA3, DIGITS = PRE_TOKENIZERS["llama3"], PRE_TOKENIZERS["digits"]
KINDS = {
    _text.GPT2: None,
    _text.LLAMA3: LLAMA3,
    _text.GPT2_DIGITS: DIGITS,
    _text.O200K: PRE_TOKENIZERS["o200k"],
}


def vocabulary(tokenizer: Tokenizer, path: Path) -> tuple[list, dict[str, int]]:
    tokenizer.save(path)
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model["merges"], model["vocab"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([finance_text(1, 3000)], 1400)


@pytest.fixture(scope="module")
def config(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["gpt2", "llama3", "digits", "ignore_merges"])
def pair(request: pytest.FixtureRequest, config: dict) -> tuple[Tokenizer, HuggingFace]:
    changed = json.loads(json.dumps(config))
    if request.param in ("llama3", "ignore_merges"):
        changed["pre_tokenizer"] = LLAMA3
    if request.param == "digits":
        changed["pre_tokenizer"] = DIGITS
    if request.param == "ignore_merges":
        # Without half of the merges many tokens can be reached only as whole words.
        changed["model"] |= {"ignore_merges": True, "merges": changed["model"]["merges"][::2]}
    return Tokenizer(changed), HuggingFace.from_str(json.dumps(changed))


def assert_equal(pair: tuple[Tokenizer, HuggingFace], text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text, allow_special=True)
    assert ids.dtype == np.uint32
    if ids.tolist() != theirs.encode(text, add_special_tokens=False).ids:
        raise AssertionError(f"ids differ on {text[:200]!r}")
    assert ours.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize(
    ("seed", "vocab_size", "specials", "min_frequency"),
    [(2, 1500, (END,), 0), (3, 5000, (), 0), (4, 5000, ("<pad>", END, "[sep]"), 3)],
)
def test_training_equals_hugging_face(
    tmp_path: Path, seed: int, vocab_size: int, specials: tuple[str, ...], min_frequency: int
) -> None:
    texts = [finance_text(seed * 100 + i, 100) for i in range(20)]
    ours = Tokenizer.train(iter(texts), vocab_size, specials, min_frequency=min_frequency)
    theirs = json.loads(train_hugging_face(texts, vocab_size, specials, min_frequency).to_str())
    merges, vocab = vocabulary(ours, tmp_path / "tokenizer.json")
    assert merges == theirs["model"]["merges"]
    assert vocab == theirs["model"]["vocab"]
    assert ours.special_tokens == {token["content"]: token["id"] for token in theirs["added_tokens"]}


@pytest.mark.parametrize("seed", range(40))
def test_training_ties_equal_hugging_face(tmp_path: Path, seed: int) -> None:
    """Words over two or three letters: equal counts, overlapping pairs, tokens that several pairs produce."""
    random_ = random.Random(seed)
    letters = "ab" if seed % 2 else "abc"
    words = [
        "".join(random_.choices(letters, k=random_.randint(1, 14))) for _ in range(random_.randint(3, 150))
    ]
    texts = [" ".join(words), "".join(words[:9])]
    merges, vocab = vocabulary(Tokenizer.train(texts, 900), tmp_path / "tokenizer.json")
    theirs = json.loads(train_hugging_face(texts, 900).to_str())["model"]
    assert merges == theirs["merges"]
    assert vocab == theirs["vocab"]


def test_saved_file_loads_in_hugging_face_and_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"  # a folder that is not there yet
    tokenizer.save(path)
    again, theirs = Tokenizer.load(path), HuggingFace.from_file(str(path))
    assert again.vocab_size == tokenizer.vocab_size == theirs.get_vocab_size() == 1400
    assert again.special_tokens == {END: theirs.token_to_id(END)}
    text = finance_text(9, 50) + END
    ids = tokenizer.encode(text, allow_special=True)
    assert ids.tolist() == again.encode(text, allow_special=True).tolist() == theirs.encode(text).ids
    assert theirs.decode(ids.tolist(), skip_special_tokens=False) == text
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]


def test_loads_merges_written_as_strings(config: dict, tokenizer: Tokenizer) -> None:
    legacy = json.loads(json.dumps(config))
    merges = [" ".join(merge) for merge in legacy["model"]["merges"]]
    legacy["model"]["merges"] = ["#version: 0.2", *merges]
    text = finance_text(10, 20)
    assert Tokenizer(legacy).encode(text).tolist() == tokenizer.encode(text).tolist()


def test_encoding_finance_text(pair: tuple[Tokenizer, HuggingFace]) -> None:
    assert_equal(pair, finance_text(11, 1500))
    assert_equal(pair, END + finance_text(12, 5) + END + END + " " + END)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "  \n\n  \t x",
        "x \n",
        "x  ",
        "a\u00a0\u00a0b \u2003 c",
        "I'm you're we've he'll she'd it's can't 'S 'LL 'ſ 'tis ''s '",
        "1234567 1 22 333 4444 ½²Ⅷ ١٢٣",
        "\r\n\r\n a!\r\n\n?",
        "  1  2\t3",
        "a" * 40,
        "\0\x7f\x85\u200b\ufeff",
    ],
)
def test_encoding_corner_cases(pair: tuple[Tokenizer, HuggingFace], text: str) -> None:
    assert_equal(pair, text)


def hugging_face_splitting(config: dict, pre_tokenizer: dict | None) -> HuggingFace:
    return HuggingFace.from_str(
        json.dumps(config | ({"pre_tokenizer": pre_tokenizer} if pre_tokenizer else {}))
    )


def assert_same_words(theirs: HuggingFace, kind: int, text: str) -> None:
    expected = [text[begin:end] for _, (begin, end) in theirs.pre_tokenizer.pre_tokenize_str(text)]
    content = text.encode()
    ends = list(accumulate(_text.word_lengths(text, kind), initial=0))
    ours = [content[begin:end].decode() for begin, end in pairwise(ends)]
    assert ours == expected


@pytest.mark.parametrize(("kind", "pre_tokenizer"), KINDS.items())
def test_every_code_point_splits_alike(config: dict, kind: int, pre_tokenizer: dict | None) -> None:
    theirs = hugging_face_splitting(config, pre_tokenizer)
    # Digits takes its classes from a later Unicode version than the regular expressions do.
    characters = ASSIGNED if kind == _text.GPT2_DIGITS else ALL_CHARACTERS
    for start in range(0, len(characters), 500):
        part = characters[start : start + 500]
        uniform = len({unicodedata.category(c) for c in part}) == 1
        # The neighbours tell letters (joined to a), numbers (to 1), white space and the rest apart.
        assert_same_words(theirs, kind, "".join(f"a{c}1 {c}!" for c in part[:: 25 if uniform else 1]))
    for start in range(0, len(characters), 100_000):
        assert_same_words(theirs, kind, "".join(characters[start : start + 100_000]))
    assert_same_words(theirs, kind, "".join(f"'{c}\n\t{c}{c}" for c in characters[:0x3000]))


def test_encoding_every_code_point(pair: tuple[Tokenizer, HuggingFace]) -> None:
    assert_equal(pair, "".join(ALL_CHARACTERS[:0x3000] + ALL_CHARACTERS[0x3000::7]))
    assert pair[0].decode(pair[0].encode("".join(ALL_CHARACTERS))) == "".join(ALL_CHARACTERS)


mixed_text = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'sStTdDmMlLrReEvV19aé!.\u00a0\u3000ſ½日🚀"),
        st.characters(exclude_categories=("Cs", "Cn")),
    ),
    max_size=60,
)


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(text=mixed_text)
def test_encoding_random_text(pair: tuple[Tokenizer, HuggingFace], text: str) -> None:
    assert_equal(pair, text)


@pytest.mark.parametrize(("kind", "pre_tokenizer"), KINDS.items())
def test_random_text_splits_alike(config: dict, kind: int, pre_tokenizer: dict | None) -> None:
    theirs = hugging_face_splitting(config, pre_tokenizer)

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(text=mixed_text)
    def check(text: str) -> None:
        assert_same_words(theirs, kind, text)

    check()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(content=st.binary(max_size=80))
@example(content=f"a{END}".encode())  # hypothesis takes such from the sources, in some runs
def test_any_bytes_round_trip(tokenizer: Tokenizer, content: bytes) -> None:
    ids = tokenizer.encode(content, allow_special=True)
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == content.decode("utf-8", errors="replace")


def test_invalid_bytes_are_other_characters(tokenizer: Tokenizer) -> None:
    # Cut bytes, overlong forms, surrogates and values beyond U+10FFFF end a run of letters.
    for bad in (b"\xff", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe6\x97"):
        ids = tokenizer.encode(b" the" + bad + b" the").tolist()
        the = tokenizer.encode(" the").tolist()
        assert ids[: len(the)] == the and ids[-len(the) :] == the


@pytest.mark.parametrize("word", ["a", "ab", "é", "!", " ", "\n", "9"])
def test_a_million_repeats(pair: tuple[Tokenizer, HuggingFace], word: str) -> None:
    text = word * (1_000_000 // len(word))
    start = time.perf_counter()
    pair[0].encode(text)
    assert time.perf_counter() - start < 10, "a long word must not take quadratic time"
    assert_equal(pair, text[:50_000])


def test_long_words_merge_like_short_ones() -> None:
    """Random words around the length where the merge loop changes, over few letters so that merges abound."""
    random_ = random.Random(5)
    texts = ["".join(random_.choices("abc", k=length)) for length in [*range(1, 80), 500, 5000]]
    theirs = train_hugging_face(texts, 700)
    ours = Tokenizer(json.loads(theirs.to_str()))
    for text in texts:
        shuffled = "".join(random_.sample(text, len(text)))
        assert_equal((ours, theirs), shuffled)


def test_encode_batch_equals_encode(tokenizer: Tokenizer) -> None:
    texts = [finance_text(seed, seed % 7) for seed in range(60)] + ["", b"\xff\xfe"]
    for threads in (0, 1, 3):
        batch = tokenizer.encode_batch(texts, threads=threads)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_in_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens[END]
    with pytest.raises(ValueError, match=r"special token <\|endoftext\|> at byte 3.*allow_special"):
        tokenizer.encode(f"abc{END}")
    with pytest.raises(ValueError, match="special token"):
        tokenizer.encode_batch(["fine", END.encode()])
    assert tokenizer.encode(END, allow_special=True).tolist() == [end]
    assert tokenizer.encode(f"{END}<|end", allow_special=True).tolist()[0] == end
    assert end not in tokenizer.encode("<|endoftext|").tolist()


def test_overlapping_special_tokens_take_the_longest() -> None:
    texts = [finance_text(1, 20)]
    specials = ("<a>", "<a><b>", "b>")
    pair = Tokenizer.train(texts, 300, specials), train_hugging_face(texts, 300, specials)
    for text in ("<a><b>", "x<a><a><b>b>", "<a>b><b>", "<<a>>"):
        assert_equal(pair, text)


def test_lone_surrogates_raise(tokenizer: Tokenizer) -> None:
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(ValueError, match="lone surrogate"):
            call("price \ud83d up")
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.train(["\udc00"], 300)


def test_decode_refuses_unknown_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([]) == ""
    for ids in ([1400], [-1], np.array([5, 2**32], dtype=np.int64)):
        with pytest.raises(ValueError, match="outside the vocabulary of 1400"):
            tokenizer.decode(ids)
    with pytest.raises(TypeError, match="integers"):
        tokenizer.decode([0.5])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Tokenizer.train([], 300), ValueError, "no text"),
        (lambda: Tokenizer.train(["", b""], 300), ValueError, "no text"),
        (lambda: Tokenizer.train(["a"], 256), ValueError, "at least 257"),
        (lambda: Tokenizer.train(["a"], 300, ("x", "x")), ValueError, "distinct"),
        (lambda: Tokenizer.train(["a"], 300, ("a",)), ValueError, "clash"),
        (lambda: Tokenizer.train(["the the the"], 300, ("the",)), ValueError, "also a special token"),
        (lambda: Tokenizer.train("text", 300), TypeError, "iterable of texts"),
        (lambda: Tokenizer.train([1], 300), TypeError, "str or bytes"),  # type: ignore[list-item]
        (lambda: Tokenizer.train(["a"], 300, END), TypeError, "sequence"),
    ],
)
def test_training_refusals(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def _set(path: str, value):
    def change(config: dict) -> None:
        *parents, last = path.split(".")
        for name in parents:
            config = config[name]
        config[last] = value

    return change


def _without_byte(config: dict) -> None:
    """Drop the byte 'z' with its merges, keeping ids contiguous."""
    model = config["model"]
    model["merges"] = [merge for merge in model["merges"] if not any("z" in token for token in merge)]
    kept = [token for token in model["vocab"] if "z" not in token]
    model["vocab"] = {token: index for index, token in enumerate(kept)}


FAULTS = {
    "WordPiece": (_set("model", {"type": "WordPiece", "vocab": {}}), "WordPiece"),
    "Unigram": (_set("model", {"type": "Unigram", "vocab": []}), "Unigram"),
    "no model": (lambda config: config.pop("model"), "no 'model'"),
    "missing byte": (_without_byte, r"no token for byte 122 \('z'\)"),
    "duplicate id": (_set("model.vocab.a", 300), "gives the id 300 to both"),
    "hole": (_set("model.vocab.a", 5000), "no token with the id"),
    "negative id": (_set("model.vocab.a", -1), "with the id -1"),
    "not an id": (_set("model.vocab.a", "7"), "with the id '7'"),
    "a list for an id": (_set("model.vocab.a", [1]), r"with the id \[1\]"),
    "a bool for an id": (_set(f"model.vocab.{END}", False), "with the id False"),
    "empty vocabulary": (_set("model.vocab", {}), "has no token"),
    "not byte-level": (_set("model.vocab.日", 1400), "not byte-level"),
    "missing parent": (
        lambda config: config["model"]["merges"].append(["qqq", "e"]),
        "'qqq' is not in its vocabulary",
    ),
    "missing product": (
        lambda config: config["model"]["merges"].append(["é", "é"]),
        "'éé' is not in its vocabulary",
    ),
    "no pair": (lambda config: config["model"]["merges"].append("a b c"), "no pair of tokens"),
    "merges missing": (lambda config: config["model"].pop("merges"), "no model.merges"),
    "normalizer": (_set("normalizer", {"type": "NFC"}), "normalizer"),
    "truncation": (_set("truncation", {"max_length": 5}), "truncation"),
    "dropout": (_set("model.dropout", 0.1), "dropout"),
    "byte_fallback": (_set("model.byte_fallback", True), "byte_fallback"),
    "Whitespace": (_set("pre_tokenizer", {"type": "Whitespace"}), "unsupported pre_tokenizer"),
    "no pre-tokenizer": (_set("pre_tokenizer", None), "unsupported pre_tokenizer"),
    "prefix space": (_set("pre_tokenizer.add_prefix_space", True), "unsupported pre_tokenizer"),
    "Metaspace": (_set("decoder", {"type": "Metaspace"}), "no ByteLevel decoder"),
    "special id": (_set("added_tokens", [{"id": 3, "content": END, "special": True}]), "gives the id 3"),
    "strip": (
        _set("added_tokens", [{"id": 0, "content": END, "special": True, "lstrip": True}]),
        "lstrip",
    ),
    "merged special": (
        _set("added_tokens", [{"id": 0, "content": END, "special": True}, {"id": 257, "content": "?"}]),
        "not special",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_loading_names_file_and_fault(config: dict, tmp_path: Path, name: str) -> None:
    change, match = FAULTS[name]
    broken = json.loads(json.dumps(config))
    change(broken)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b'{"model": {}}'])
def test_loading_broken_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: ") as caught:
        Tokenizer.load(path)
    assert len(str(caught.value)) < 400


def test_encode_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    first.write_text(finance_text(1, 5), encoding="utf-8")
    second.write_text('{"text": "one"}\n{"text": "two"}\n')
    manifest = tokenizer.encode_files([first, second], tmp_path / "shards")
    assert manifest["documents"] == 3 and manifest["end_of_text"] == tokenizer.special_tokens[END]
    assert verify_shards(tmp_path / "shards") == manifest
    for path, content, match in (
        (first, b"caf\xe9", "a.txt is not UTF-8"),
        (second, b'{"txt": 1}', "b.jsonl, line 1 has no"),
        (second, b"{}\n{", "b.jsonl, line 1"),
        (second, b'{"text": "x<|endoftext|>"}', "b.jsonl, line 1: text contains the special token"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            tokenizer.encode_files([path], tmp_path / "shards")
    assert verify_shards(tmp_path / "shards") == manifest


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the shared corpora are not here")
def test_corpora_equal_hugging_face(tmp_path: Path) -> None:
    texts, size = [], 0
    documents = corpus_texts("fomc-minutes.jsonl.gz")
    while size < 2_000_000:
        texts.append(next(documents))
        size += len(texts[-1])
    ours, theirs = Tokenizer.train(texts, 8000), train_hugging_face(texts, 8000)
    merges, vocab = vocabulary(ours, tmp_path / "tokenizer.json")
    model = json.loads(theirs.to_str())["model"]
    assert merges == model["merges"] and vocab == model["vocab"]
    for ids, encoding in zip(ours.encode_batch(texts), theirs.encode_batch(texts), strict=True):
        assert ids.tolist() == encoding.ids

"""Every format of tokenizer files: what is read, written, recognised, and refused by name and fault."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFace

from tapelm import _text
from tapelm._tokenizer_json import PRE_TOKENIZERS
from tapelm.tokenizer import Tokenizer
from tests.kernels.tokenizer_cases import (
    END,
    TIKTOKEN_PATTERNS,
    encoding,
    finance_text,
    random_tokens,
    rank_file,
    tokens_of,
    train_hugging_face,
)

TEXT = finance_text(21, 300) + " x\n\n  y  12345 \r\n\r\n' 'll ʼ's"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([finance_text(1, 1000)], 900)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> list[bytes]:
    return tokens_of(tokenizer)


@pytest.fixture
def gpt2_files(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """encoder.json and vocab.bpe as GPT-2 has them, with the special token at the end."""
    tokenizer.save(tmp_path / "full.json")
    model = json.loads((tmp_path / "full.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "full.json").unlink()
    vocab = {token: index - 1 for token, index in model["vocab"].items() if token != END}
    (tmp_path / "encoder.json").write_text(json.dumps(vocab | {END: len(vocab)}))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "vocab.bpe").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("seed", range(60))
def test_ranks_in_any_order_merge_like_tiktoken(seed: int) -> None:
    """Tokens that rank below their parts, that several pairs could make, and that no pair makes."""
    letters, tokens = random_tokens(seed)
    bpe = _text.Bpe(tokens, _text.merges_of_ranks(tokens), [], _text.GPT2, True)
    theirs = encoding(tokens, "gpt2", {})
    random_ = random.Random(seed)
    for length in [*range(1, 40), 90, 120, 300]:  # tiktoken changes its loop at 100 bytes
        word = "".join(random_.choices(letters, k=length))
        assert bpe.encode(word, False).tolist() == theirs.encode_ordinary(word), word


@pytest.mark.parametrize("pretokenizer", TIKTOKEN_PATTERNS)
def test_rank_files_equal_tiktoken(tmp_path: Path, tokens: list[bytes], pretokenizer: str) -> None:
    path = tmp_path / "test.tiktoken"
    path.write_bytes(rank_file(tokens))
    specials = {END: len(tokens), "<|pad|>": len(tokens) + 3}
    ours = Tokenizer.load(path, pretokenizer=pretokenizer, special_tokens=specials)
    theirs = encoding(tokens, pretokenizer, specials)
    assert ours.vocab_size == theirs.n_vocab == len(tokens) + 4
    reserved = {f"<|reserved_{len(tokens) + i}|>": len(tokens) + i for i in (1, 2)}
    assert ours.special_tokens == specials | reserved
    for text in (TEXT, "", END, f"a{END}b<|pad|>"):
        ids = ours.encode(text, allow_special=True).tolist()
        assert ids == theirs.encode(text, allowed_special="all")
        assert ours.decode_bytes(ids) == theirs.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("pretokenizer", PRE_TOKENIZERS)
def test_rank_files_become_a_tokenizer_json(tmp_path: Path, tokens: list[bytes], pretokenizer: str) -> None:
    """Also with tokens that no merge makes, which need Hugging Face's ignore_merges."""
    tokens = [*tokens, b" 12345", "日本銀行は".encode()]
    (tmp_path / "x.tiktoken").write_bytes(rank_file(tokens))
    ours = Tokenizer.load(
        tmp_path / "x.tiktoken", pretokenizer=pretokenizer, special_tokens={END: len(tokens) + 1}
    )
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    theirs = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    assert again.special_tokens == ours.special_tokens and again.vocab_size == ours.vocab_size
    text = f"{TEXT} 日本銀行は 12345 {END}"
    ids = ours.encode(text, allow_special=True).tolist()
    assert ids == theirs.encode(text).ids == again.encode(text, allow_special=True).tolist()
    assert theirs.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
@pytest.mark.parametrize("pretokenizer", PRE_TOKENIZERS)
def test_transformers_loads_and_saves_our_file(
    tmp_path: Path, tokens: list[bytes], pretokenizer: str
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "x.tiktoken").write_bytes(rank_file(tokens))
    special = {END: len(tokens)}
    ours = Tokenizer.load(tmp_path / "x.tiktoken", pretokenizer=pretokenizer, special_tokens=special)
    ours.save(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(TEXT + END, allow_special=True).tolist()
    assert theirs(TEXT + END)["input_ids"] == ids and len(theirs) == ours.vocab_size
    assert theirs.decode(ids) == TEXT + END
    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode(TEXT + END, allow_special=True).tolist() == ids


@pytest.mark.parametrize("suffix", [".tiktoken", ".model"])
def test_saving_ranks(tmp_path: Path, tokenizer: Tokenizer, tokens: list[bytes], suffix: str) -> None:
    path = tmp_path / f"tokenizer{suffix}"
    tokenizer.save(path)
    assert path.read_bytes() == rank_file(tokens, first=1)
    again = Tokenizer.load(path, pretokenizer="gpt2", special_tokens={END: 0})
    theirs = encoding(tokens, "gpt2", {END: 0}, first=1)
    ids = tokenizer.encode(TEXT).tolist()
    assert ids == again.encode(TEXT).tolist() == theirs.encode_ordinary(TEXT)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_saving_ranks_is_refused_where_tiktoken_would_differ(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    config = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    model, target = config["model"], tmp_path / "x.tiktoken"
    merges, vocab = model["merges"], model["vocab"]
    whole = {"merges": merges, "vocab": vocab | {"12345": 900}}
    for changed, fault in (
        ({"merges": [*merges[1:], merges[0]]}, "its merges are not those that follow from its ids"),
        ({"merges": merges[:-1]}, "its merges are not those"),
        (whole, "no merge makes its token b'12345'"),
    ):
        with pytest.raises(ValueError, match=f"x.tiktoken: .*{fault}"):
            Tokenizer(config | {"model": model | changed}).save(target)
        assert not target.exists()
    # Merges that are never carried out do no harm, and a whole word needs no merge with ignore_merges.
    splits = ([token[:cut], token[cut:]] for token in vocab for cut in range(1, len(token)))
    unused = [pair for pair in splits if pair not in merges and all(part in vocab for part in pair)]
    assert unused
    changed = model | whole | {"merges": [*merges, *unused], "ignore_merges": True}
    Tokenizer(config | {"model": changed}).save(target)
    again = Tokenizer.load(target, pretokenizer="gpt2", special_tokens={END: 0})
    assert again.encode(TEXT).tolist() == HuggingFace.from_str(json.dumps(config)).encode(TEXT).ids


def test_llama3_is_known_by_its_128000_ranks(tmp_path: Path, tokens: list[bytes]) -> None:
    filler = (b"~%d~" % number for number in range(128_000))
    tokens = [*tokens, *(token for _, token in zip(range(128_000 - len(tokens)), filler, strict=False))]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(rank_file(tokens))
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == 128_256 and len(ours.special_tokens) == 256
    for text, index in {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eot_id|>": 128_009,
        "<|reserved_special_token_247|>": 128_255,
    }.items():
        assert ours.special_tokens[text] == index
    theirs = encoding(tokens, "llama3", ours.special_tokens)
    text = "<|begin_of_text|>" + TEXT
    assert ours.encode(text, allow_special=True).tolist() == theirs.encode(text, allowed_special="all")
    path.write_bytes(rank_file(tokens[:-1]))
    with pytest.raises(ValueError, match=r"tokenizer.model: is a rank file of 127999 tokens.*pretokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize("given", ["", "encoder.json", "vocab.bpe", "renamed"])
def test_gpt2_pair_of_files(gpt2_files: Path, tokenizer: Tokenizer, given: str) -> None:
    if given == "renamed":
        (gpt2_files / "encoder.json").rename(gpt2_files / "vocab.json")
        (gpt2_files / "vocab.bpe").rename(gpt2_files / "merges.txt")
        given = "merges.txt"
    ours = Tokenizer.load(gpt2_files / given)
    assert ours.vocab_size == 900 and ours.special_tokens == {END: 899}
    assert ours.encode(TEXT).tolist() == (tokenizer.encode(TEXT) - 1).tolist()
    assert ours.encode(END, allow_special=True).tolist() == [899]
    ours.save(gpt2_files / "tokenizer.json")
    theirs = HuggingFace.from_file(str(gpt2_files / "tokenizer.json"))
    assert theirs.encode(TEXT + END).ids == [*ours.encode(TEXT).tolist(), 899]


def test_gpt2_pair_with_named_special_tokens(gpt2_files: Path) -> None:
    ours = Tokenizer.load(gpt2_files, pretokenizer="llama3", special_tokens={END: 899, "<|pad|>": 900})
    assert ours.special_tokens == {END: 899, "<|pad|>": 900}
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>'.*special token with the id 7"):
        Tokenizer.load(gpt2_files, special_tokens={END: 7})
    with pytest.raises(ValueError, match=r"vocab.bpe has no merge for 1 tokens, such as '<\|endoftext\|>'"):
        Tokenizer.load(gpt2_files, special_tokens={})


def test_formats_are_told_apart_by_content(tmp_path: Path, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
    tokenizer.save(tmp_path / "a.json")
    (tmp_path / "a.json").rename(tmp_path / "json.model")
    (tmp_path / "ranks.json").write_bytes(rank_file(tokens))
    ids = tokenizer.encode(TEXT).tolist()
    assert Tokenizer.load(tmp_path / "json.model").encode(TEXT).tolist() == ids
    ranks = Tokenizer.load(tmp_path / "ranks.json", pretokenizer="gpt2")
    assert (ranks.encode(TEXT) + 1).tolist() == ids


@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Removed", True)])
def test_splitting_by_matches_has_two_spellings(behavior: str, invert: bool) -> None:
    config = json.loads(train_hugging_face([finance_text(3, 100)], 400).to_str())
    config["pre_tokenizer"] = json.loads(json.dumps(PRE_TOKENIZERS["llama3"]))
    config["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": behavior, "invert": invert}
    ids = HuggingFace.from_str(json.dumps(config)).encode(TEXT).ids
    assert Tokenizer(config).encode(TEXT).tolist() == ids


def test_unusable_arguments(tmp_path: Path, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(rank_file(tokens))
    tokenizer.save(tmp_path / "tokenizer.json")
    size = len(tokens)
    for arguments, fault in (
        ({}, rf"does not say how text is split: .*: {size}\}}"),
        ({"pretokenizer": "gpt5"}, "pretokenizer must be one of gpt2, llama3, digits"),
        (
            {"pretokenizer": "gpt2", "special_tokens": {END: size - 1}},
            f"rank {size - 1}, the id",
        ),
        ({"pretokenizer": "gpt2", "special_tokens": {END: -1}}, "special_tokens must map"),
        ({"pretokenizer": "gpt2", "special_tokens": {"": size}}, "special_tokens must map"),
        ({"pretokenizer": "gpt2", "special_tokens": {"a": size}}, "ordinary token 'a'"),
        ({"pretokenizer": "gpt2", "special_tokens": {"x!": size, "y!": size}}, "give an id twice"),
        ({"pretokenizer": "gpt2", "special_tokens": {END: 2**31}}, "ids above the 899 ranks without a token"),
        ({"pretokenizer": "gpt2", "special_tokens": {"\ud800": size}}, "lone surrogate"),
    ):
        with pytest.raises(ValueError, match=fault):
            Tokenizer.load(path, **arguments)
    with pytest.raises(ValueError, match=r"tokenizer.json: .*a tokenizer.json has its own"):
        Tokenizer.load(tmp_path / "tokenizer.json", pretokenizer="gpt2")


def _lines(change: Callable[[list[bytes]], object]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        lines = content.splitlines()
        change(lines)
        return b"\n".join(lines)

    return apply


RANK_FAULTS = {
    "missing byte": (_lines(lambda lines: lines.pop(5)), "no token for byte 38: it is incomplete"),
    "hole": (_lines(lambda lines: lines.pop(500)), "no token with the rank 500, but higher ranks"),
    "far rank": (_lines(lambda lines: lines.append(b"YWJhYmFi 999999999")), "no token with the rank 899"),
    "rank twice": (_lines(lambda lines: lines.append(b"YWJhYmFi 7")), "line 900 has the rank 7, which"),
    "token twice": (
        _lines(lambda lines: lines.append(lines[8].split()[0] + b" 899")),
        "line 900 has the token",
    ),
    "base64": (_lines(lambda lines: lines.append(b"YWJ 899")), "line 900 has broken base64"),
    "no base64": (_lines(lambda lines: lines.append(b"\xff\xfe 899")), "line 900 has broken base64"),
    "no rank": (
        _lines(lambda lines: lines.append(b"YWJhYmFi")),
        "line 900 is no token in base64",
    ),
    "rank no number": (_lines(lambda lines: lines.append(b"YWJhYmFi -1")), "line 900 is no token"),
    "cut in a rank": (lambda content: content[:-2], "line 899 has the rank 89, which"),
    "cut in a token": (lambda content: content[: content.rindex(b" ")], "line 899 is no token"),
    "sentencepiece": (
        lambda content: b"\n\x0e\n\x05<unk>\x15\0\0\0\0",
        "line 2 is no token in base64",
    ),
    "empty": (lambda content: b"", "no token for byte 0"),
}


@pytest.mark.parametrize("name", RANK_FAULTS)
def test_broken_rank_files_name_file_and_fault(tmp_path: Path, tokens: list[bytes], name: str) -> None:
    change, match = RANK_FAULTS[name]
    path = tmp_path / "broken.tiktoken"
    path.write_bytes(change(rank_file(tokens)))
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.load(path, pretokenizer="gpt2")
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 400


GPT2_FAULTS = {
    "truncated": (
        "vocab.bpe",
        lambda content: content[: content.rindex(b"\n", 0, -1) + 1],
        "no merge for 1 tokens",
    ),
    "cut in a line": ("vocab.bpe", lambda content: content[: content.rindex(b" ")], "line 644 is no pair"),
    "missing parent": ("vocab.bpe", lambda content: content + b"qqq e\n", "line 645 has 'qqq', which"),
    "not UTF-8": ("vocab.bpe", lambda content: content + b"\xff \xfe\n", "vocab.bpe is not UTF-8"),
    "three parts": ("vocab.bpe", lambda content: content + b"a b c\n", "line 645 is no pair"),
    "no JSON": ("encoder.json", lambda content: content[:-9], "not valid JSON"),
    "id twice": (
        "encoder.json",
        lambda content: content.replace(b": 300,", b": 301,"),
        "gives the id 301 to both",
    ),
    "no id": ("encoder.json", lambda content: content.replace(b": 300,", b': "x",'), "with the id 'x'"),
    "missing byte": (
        "encoder.json",
        lambda content: content.replace(b'"!": 0', b'"!!!": 0'),
        "no merge for 1 tokens",
    ),
}


@pytest.mark.parametrize("given", ["encoder.json", "vocab.bpe"])
@pytest.mark.parametrize("name", GPT2_FAULTS)
def test_broken_gpt2_files_name_file_and_fault(gpt2_files: Path, name: str, given: str) -> None:
    broken, change, match = GPT2_FAULTS[name]
    content = (gpt2_files / broken).read_bytes()
    (gpt2_files / broken).write_bytes(change(content))
    assert (gpt2_files / broken).read_bytes() != content
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.load(gpt2_files / given)
    assert str(caught.value).startswith(f"{gpt2_files}/") and len(str(caught.value)) < 400


def test_missing_files(gpt2_files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (gpt2_files / "vocab.bpe").unlink()
    with pytest.raises(ValueError, match=r"encoder\.json: needs vocab\.bpe beside it"):
        Tokenizer.load(gpt2_files)
    (gpt2_files / "encoder.json").rename(gpt2_files / "other.json")
    with pytest.raises(ValueError, match=r"must be called encoder\.json, vocab\.json"):
        Tokenizer.load(gpt2_files / "other.json")
    with pytest.raises(ValueError, match=r"without any of tokenizer\.json, encoder\.json"):
        Tokenizer.load(tmp_path_factory.mktemp("empty"))
    for missing in (gpt2_files / "nowhere.json", gpt2_files / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"directory with one of tokenizer\.json,") as caught:
            Tokenizer.load(missing)
        assert caught.value.filename == str(missing) and str(missing) in str(caught.value)


def test_a_lone_surrogate_in_a_special_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8").replace(END, "\\ud800")
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.load(tmp_path)


def test_merges_of_ranks_refuses_what_no_file_can_hold() -> None:
    tokens = [bytes([byte]) for byte in range(256)]
    with pytest.raises(ValueError, match="no token for byte 7"):
        _text.merges_of_ranks([*tokens[:7], b"", *tokens[8:]])
    with pytest.raises(ValueError, match="rank 256 has a lower rank"):
        _text.merges_of_ranks([*tokens, b"a"])
    assert _text.merges_of_ranks([b"", *tokens, b"ab"]).tolist() == [[98, 99, 257]]

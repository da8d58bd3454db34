"""The Hugging Face `tokenizer.json` of a byte-level BPE, checked and taken apart.

Every fault found here is a ValueError that names it; `Tokenizer.load` adds the name of the file.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from tapelm import _text
from tapelm._tokenizer_json import CHARACTER_OF_BYTE, GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, require

_SPLIT_PATTERNS = {GPT2_PATTERN: _text.GPT2, LLAMA3_PATTERN: _text.LLAMA3, O200K_PATTERN: _text.O200K}
# Two ways to say that the matches are the words: every character of a text belongs to a match.
_ALL_MATCHES = (("Isolated", False), ("Removed", True))
_NO_BYTE = 0xFFFF  # stands for the characters below U+0100 that stand for no byte
_BYTE_OF_CHARACTER = dict.fromkeys(range(256), _NO_BYTE) | {
    ord(character): byte for byte, character in enumerate(CHARACTER_OF_BYTE)
}


class BpeFile(NamedTuple):
    """What the encoder needs of a tokenizer.json.

    tokens: bytes of every id. merges: uint32 (n, 3) rows of ids (left, right, joined) in rank order.
    specials: id of every special token by its text. pre_tokenizer: a constant of `tapelm._text`.
    ignore_merges: a word that is a token as a whole is that token, whatever the merges say.
    """

    tokens: list[bytes]
    merges: np.ndarray
    specials: dict[str, int]
    pre_tokenizer: int
    ignore_merges: bool

    def sha256(self) -> str:
        """A digest of all that decides about ids."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.uint32)
        digest = hashlib.sha256(b"".join([lengths.tobytes(), *self.tokens, self.merges.tobytes()]))
        rest = (sorted(self.specials.items()), self.pre_tokenizer, self.ignore_merges, len(self.tokens))
        digest.update(json.dumps(rest).encode())
        return digest.hexdigest()


def read_config(config: Any) -> BpeFile:
    """Check a parsed tokenizer.json and take it apart; raises ValueError naming what is wrong with it."""
    require(isinstance(config, dict), "is not a tokenizer.json: it holds no JSON object")
    model = config.get("model")
    require(isinstance(model, dict), "is not a tokenizer.json: it has no 'model' object")
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    require(kind == "BPE", f"has a model of type {kind}: only byte-level BPE is supported")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        require(not model.get(name), f"sets model.{name} to {model.get(name)!r}, which is not supported")
    for name in ("normalizer", "truncation", "padding"):
        require(not config.get(name), f"has a {name}, which is not supported: remove it from the file")
    decoder = config.get("decoder")
    require(
        isinstance(decoder, dict) and decoder.get("type") == "ByteLevel",
        "has no ByteLevel decoder: only byte-level BPE is supported",
    )
    pre_tokenizer = _read_pre_tokenizer(config.get("pre_tokenizer"))
    specials = _read_specials(config.get("added_tokens") or [])
    vocab = model.get("vocab")
    require(isinstance(vocab, dict), "has no model.vocab object")
    tokens = _read_tokens(vocab, specials)
    merges = _read_merges(model.get("merges"), vocab)
    return BpeFile(tokens, merges, specials, pre_tokenizer, bool(model.get("ignore_merges")))


def _read_pre_tokenizer(section: Any) -> int:
    steps = (
        section.get("pretokenizers")
        if isinstance(section, dict) and section.get("type") == "Sequence"
        else [section]
    )
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return _text.GPT2
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in _SPLIT_PATTERNS and (behavior, invert) in _ALL_MATCHES:
            return _SPLIT_PATTERNS[pattern]
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return _text.GPT2_DIGITS
    raise ValueError(
        f"has an unsupported pre_tokenizer {str(section)[:99]}: supported are ByteLevel without prefix space "
        "(GPT-2), the Llama-3, o200k or GPT-2 Split and ByteLevel, and single Digits and ByteLevel"
    )


def _read_specials(added: Any) -> dict[str, int]:
    require(isinstance(added, list), "has added_tokens that are no list")
    specials: dict[str, int] = {}
    for token in added:
        match token:
            case {"id": int(index), "content": str(content), **flags} if content and index >= 0:
                pass
            case _:
                raise ValueError(f"has an added token without content and id: {str(token)[:200]}")
        for flag in ("single_word", "lstrip", "rstrip"):
            require(
                not flags.get(flag), f"has the added token {content!r} with {flag}, which is not supported"
            )
        require(
            bool(flags.get("special")),
            f"has the added token {content!r} that is not special, which is not supported",
        )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"has the added token {content!r} with a lone surrogate, no character"
            ) from error
        require(content not in specials, f"lists the added token {content!r} twice")
        specials[content] = index
    return specials


def _read_tokens(vocab: dict[str, Any], specials: dict[str, int]) -> list[bytes]:
    if {*map(type, vocab.values()), *map(type, specials.values())} - {int}:
        raise ValueError(_bad_id(vocab, specials))
    every = {**vocab, **specials}
    token_of = {index: token for token, index in every.items()}
    distinct = min(token_of, default=0) >= 0 and len(token_of) == len(every)
    if not distinct or any(vocab.get(token, index) != index for token, index in specials.items()):
        raise ValueError(_bad_id(vocab, specials))
    missing = next(index for index in range(len(token_of) + 1) if index not in token_of)
    require(missing == len(token_of), f"has no token with the id {missing}, but higher ids")
    texts = [token_of[index] for index in range(len(token_of))]
    # One character is one byte, so that all tokens are translated at once and cut apart again.
    plain = ["" if text in specials else text for text in texts]
    try:
        content = "".join(plain).translate(_BYTE_OF_CHARACTER).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(_no_byte(plain)) from None
    tokens, begin = [], 0
    require("" not in every, f"has an empty token (id {every.get('')})")
    for text, own in zip(texts, plain, strict=True):
        tokens.append(content[begin : begin + len(own)] if own else text.encode())
        begin += len(own)
    for byte, character in enumerate(CHARACTER_OF_BYTE):
        require(
            character in vocab, f"has no token for byte {byte} ({character!r}): its vocabulary is incomplete"
        )
    return tokens


def _bad_id(vocab: dict[str, Any], specials: dict[str, int]) -> str:
    """What is wrong with the first token whose id is none, or that of another token."""
    token_of: dict[int, str] = {}
    for token, index in [*vocab.items(), *specials.items()]:
        if type(index) is not int or index < 0:
            return f"has the token {token!r} with the id {index!r}"
        known = token_of.setdefault(index, token)
        if known != token:
            return f"gives the id {index} to both {known!r} and {token!r}"
        if vocab.get(token, index) != index:
            return f"has the token {token!r} with the ids {vocab.get(token)} and {index}"
    raise AssertionError("every token has an id of its own")


def _no_byte(tokens: list[str]) -> str:
    """What is wrong with the first token that holds a character that stands for no byte."""
    for index, token in enumerate(tokens):
        for character in token:
            if not character.translate(_BYTE_OF_CHARACTER) <= "\xff":
                return (
                    f"has the token {token!r} (id {index}), which is not byte-level: {character!r} stands "
                    "for no byte"
                )
    raise AssertionError("every token is byte-level")


def _read_merges(merges: Any, vocab: dict[str, int]) -> np.ndarray:
    require(isinstance(merges, list), "has no model.merges list")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if merges and isinstance(merges[0], str) and merges[0].startswith("#version"):
        del pairs[0]  # the header line of GPT-2's merges.txt
    for rank, pair in enumerate(pairs):
        if type(pair) is not list or len(pair) != 2:
            raise ValueError(f"has a merge (number {rank}) that is no pair of tokens: {str(pair)[:200]}")
    try:
        rows = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    except (KeyError, TypeError):
        raise ValueError(_no_tokens(pairs, vocab)) from None
    return np.array(rows, dtype=np.uint32).reshape(-1, 3)


def _no_tokens(pairs: list[list[Any]], vocab: dict[str, int]) -> str:
    """What is wrong with the first merge whose tokens are not in the vocabulary."""
    for rank, (left, right) in enumerate(pairs):
        if not (isinstance(left, str) and isinstance(right, str) and left and right):
            return f"has a merge (number {rank}) that is no pair of tokens: {str([left, right])[:200]}"
        for token in (left, right, left + right):
            if token not in vocab:
                named = f"{left!r} + {right!r} (number {rank})"
                return f"has the merge {named}, but {token!r} is not in its vocabulary"
    raise AssertionError("every merge has its tokens")

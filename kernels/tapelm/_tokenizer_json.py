"""The Hugging Face `tokenizer.json` of a byte-level BPE, made after training; _tokenizer_reader.py reads it.

In the file a token is text in which every byte stands as one printable character.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_MARKS = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_UPPER, _O200K_LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = "|".join(
    (
        f"{_O200K_UPPER}*{_O200K_LOWER}+".join(_O200K_MARKS),
        f"{_O200K_UPPER}+{_O200K_LOWER}*".join(_O200K_MARKS),
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


# How text is split into words, by the name of the splitting.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt2": _BYTE_LEVEL,
    "llama3": _split(LLAMA3_PATTERN),
    "digits": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "o200k": _split(O200K_PATTERN),
}


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where printable, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


CHARACTER_OF_BYTE = _byte_alphabet()


def new_config(specials: list[str], byte_ids: list[int], rows: list[list[int]]) -> dict[str, Any]:
    """The tokenizer.json of a trained vocabulary; `rows` are merges (left, right, joined) in rank order."""
    token = dict(enumerate(specials))
    token.update({index: CHARACTER_OF_BYTE[byte] for byte, index in enumerate(byte_ids)})
    for left, right, joined in sorted(rows, key=lambda row: row[2]):
        token[joined] = token[left] + token[right]
    vocab = {token[index]: index for index in sorted(token)}
    require(
        len(vocab) == len(token), f"special_tokens {specials} clash with ordinary tokens: choose other texts"
    )
    merges = [[token[left], token[right]] for left, right, _ in rows]
    return make_config(vocab, merges, {text: index for index, text in enumerate(specials)}, "gpt2", False)


def make_config(
    vocab: Mapping[str, int],
    merges: list[list[str]],
    specials: Mapping[str, int],
    pretokenizer: str,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The tokenizer.json of tokens and merges written in printable characters.

    `vocab` may hold the special tokens or not; `pretokenizer` is a name of PRE_TOKENIZERS.
    """
    for text, index in specials.items():
        require(
            vocab.get(text, index) == index,
            f"has the ordinary token {text!r}, the text of a special token with the id {index}",
        )
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": {**vocab, **specials},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, **added}
            for text, index in sorted(specials.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pretokenizer],
        "post_processor": None,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": model,
    }


def require(condition: bool, fault: str) -> None:
    """Raise a ValueError that names the fault unless the condition holds."""
    if not condition:
        raise ValueError(fault)

"""tiktoken rank files (`.tiktoken`, Llama-3's `tokenizer.model`): a token in base64 and its rank per line.

A rank is an id. Such a file has no merges: they follow from the ranks (csrc/text/rank_merges.h has the
argument), and a word that is a token as a whole is that token. Neither the splitting nor the special tokens
are in the file. Every fault found here is a ValueError; `Tokenizer.load` and `save` add the name of the file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np

from tapelm import _text
from tapelm._tokenizer_json import CHARACTER_OF_BYTE, make_config, require
from tapelm._tokenizer_reader import BpeFile

_LLAMA3_RANKS = 128_000
_MOST_RESERVED = 2**16  # a special token further above the ranks than this is a mistake
_CHARACTERS = dict(enumerate(CHARACTER_OF_BYTE))


def _llama3_specials() -> dict[str, int]:
    """The 256 special tokens of Llama 3.1 to 3.3 (in 3.0 some of them had reserved names)."""
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id"]
    names += ["eom_id", "eot_id", "python_tag"]
    names += [f"reserved_special_token_{number}" for number in range(3, 248)]
    return {f"<|{name}|>": index for index, name in enumerate(names, _LLAMA3_RANKS)}


def read_ranks(content: bytes) -> dict[int, bytes]:
    """The token of every rank."""
    token_of: dict[int, bytes] = {}
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > 9:
            raise ValueError(f"line {number} is no token in base64 and its rank: {line[:60]!r}")
        try:
            token = base64.b64decode(fields[0], validate=True)
        except binascii.Error as error:
            raise ValueError(f"line {number} has broken base64 ({error}): {line[:60]!r}") from error
        rank = int(fields[1])
        if not token:
            raise ValueError(f"line {number} has an empty token")
        if rank in token_of:
            raise ValueError(f"line {number} has the rank {rank}, which an earlier line has, too")
        if token in line_of:
            raise ValueError(f"line {number} has the token {token[:60]!r}, as line {line_of[token]} has")
        token_of[rank] = token
        line_of[token] = number
    for byte in range(256):
        require(bytes([byte]) in line_of, f"has no token for byte {byte}: it is incomplete")
    return token_of


def config_of_ranks(
    token_of: Mapping[int, bytes], pretokenizer: str | None, specials: Mapping[str, int] | None
) -> dict[str, Any]:
    """The tokenizer.json of a rank file.

    128,000 ranks are Llama-3 by convention, with its special tokens unless there are `specials`. Other files
    need a `pretokenizer`. Ids between the ranks and the special tokens become reserved special tokens.
    """
    if len(token_of) == _LLAMA3_RANKS and pretokenizer in (None, "llama3"):
        pretokenizer = "llama3"
        specials = _llama3_specials() if specials is None else specials
    if pretokenizer is None:
        free = next(rank for rank in count() if rank not in token_of)
        raise ValueError(
            f"is a rank file of {len(token_of)} tokens, which does not say how text is split: "
            f'pass them: pretokenizer="gpt2", special_tokens={{"<|endoftext|>": {free}}}'
        )
    specials = dict(specials or {})
    special_of = {index: text for text, index in specials.items()}
    require(len(special_of) == len(specials), f"special_tokens give an id twice: {specials}")
    for index, text in special_of.items():
        require(
            index not in token_of,
            f"has the rank {index}, the id of the special token {text!r}: give it another",
        )
    used = token_of.keys() | special_of.keys()
    missing = next(index for index in count() if index not in used)
    highest = max(token_of)
    require(
        missing > highest,
        f"has no token with the rank {missing}, but higher ranks: it is damaged, or the rank is that of a "
        "special token to be named in special_tokens",
    )
    end = max(used) + 1
    require(
        end <= len(used) + _MOST_RESERVED,
        f"special_tokens leave {end - len(used)} ids above the {len(token_of)} ranks without a token",
    )
    specials.update({f"<|reserved_{index}|>": index for index in range(highest, end) if index not in used})
    tokens = [token_of.get(index, b"") for index in range(highest + 1)]
    texts = [token.decode("latin-1").translate(_CHARACTERS) for token in tokens]
    merges = [[texts[left], texts[right]] for left, right, _ in _text.merges_of_ranks(tokens).tolist()]
    vocab = {text: index for index, text in enumerate(texts) if text}
    return make_config(vocab, merges, specials, pretokenizer, ignore_merges=True)


def ranks_of(file: BpeFile) -> bytes:
    """The rank file of a vocabulary whose ids, taken as ranks, merge every text as its merges do.

    Raises:
        ValueError: there is no such file for this vocabulary.
    """
    special = set(file.specials.values())
    tokens = [b"" if index in special else token for index, token in enumerate(file.tokens)]
    derived = _text.merges_of_ranks(tokens)
    known, last = np.unique(
        _pairs(file.merges)[::-1], return_index=True
    )  # a pair listed twice has its last rank
    in_order = known[np.argsort(-last)]
    # A merge that does not follow from the ranks is never carried out, as the others come first.
    require(
        np.array_equal(in_order[np.isin(in_order, _pairs(derived))], _pairs(derived)),
        "this vocabulary cannot be written as ranks: its merges are not those that follow from its ids",
    )
    merged = set(derived[:, 2].tolist())
    whole = [index for index, token in enumerate(tokens) if len(token) > 1 and index not in merged]
    require(
        file.ignore_merges or not whole,
        f"this vocabulary cannot be written as ranks: no merge makes its token "
        f"{whole and tokens[whole[0]]!r}, which tiktoken would give for a whole word",
    )
    return b"".join(
        b"%s %d\n" % (base64.b64encode(token), index) for index, token in enumerate(tokens) if token
    )


def _pairs(merges: np.ndarray) -> np.ndarray:
    """One integer per merge, of its two parts."""
    return merges[:, 0].astype(np.uint64) << np.uint64(32) | merges[:, 1]

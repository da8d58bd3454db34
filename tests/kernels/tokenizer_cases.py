"""Texts, vocabularies and files for the tests of the tokenizer; peers are Hugging Face's and tiktoken's."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers, trainers

from tapelm._tokenizer_json import LLAMA3_PATTERN, O200K_PATTERN
from tapelm.tokenizer import Tokenizer

END = "<|endoftext|>"
CORPORA = Path(__file__).resolve().parents[3] / "shared" / "corpora"
# SmolLM2 cuts numbers out first, so that white space before one is at the end of a text.
DIGITS_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
TIKTOKEN_PATTERNS = {
    "gpt2": r50k_pat_str,
    "llama3": LLAMA3_PATTERN,
    "digits": DIGITS_PATTERN,
    "o200k": O200K_PATTERN,
}


def finance_text(seed: int, sentences: int) -> str:
    random_ = random.Random(seed)
    subjects = [
        "The Fed",
        "Inflation",
        "It's clear that GDP",
        "We'll see; they've said",
        "ÖPNV-Umsätze",
        "日本銀行",
    ]
    verbs = ["rose", "fell", "was unchanged at", "hadn't moved from", "naïvely\texceeded", "≈"]
    ends = [".\n", ".  ", "!\r\n\r\n", "…\u00a0", " – 🚀\n \n", "?\u3000"]
    return "".join(
        f"{random_.choice(subjects)} {random_.choice(verbs)} "
        f"{random_.randint(0, 99999) / 100:.2f}% in {random_.randint(1990, 2026)}{random_.choice(ends)}"
        for _ in range(sentences)
    )


def train_hugging_face(
    texts: list[str], vocab_size: int, specials: tuple[str, ...] = (END,), min_frequency: int = 0
) -> HuggingFace:
    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corpus_texts(name: str) -> Iterator[str]:
    """The documents of one shared corpus."""
    with gzip.open(CORPORA / name, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def rank_file(tokens: list[bytes], first: int = 0) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens, first))


def tokens_of(tokenizer: Tokenizer) -> list[bytes]:
    """The ordinary tokens in the order of ids; the special tokens must be the first ids."""
    ordinary = range(len(tokenizer.special_tokens), tokenizer.vocab_size)
    return [tokenizer.decode_bytes([index]) for index in ordinary]


def encoding(
    tokens: list[bytes], pretokenizer: str, specials: dict[str, int], first: int = 0
) -> tiktoken.Encoding:
    """tiktoken's tokenizer of these tokens, whose ids begin at `first`."""
    ranks = {token: rank for rank, token in enumerate(tokens, first)}
    return tiktoken.Encoding(
        "test", pat_str=TIKTOKEN_PATTERNS[pretokenizer], mergeable_ranks=ranks, special_tokens=specials
    )


def random_tokens(seed: int) -> tuple[str, list[bytes]]:
    """A few letters, and the 256 bytes with random words of them in an order that no training gives."""
    random_ = random.Random(seed)
    letters = random_.choice(["a", "ab", "abc", "abcd"])
    tokens = {bytes([byte]) for byte in range(256)}
    for _ in range(random_.randint(1, 200)):
        tokens.add("".join(random_.choices(letters, k=random_.randint(2, 9))).encode())
    shuffled = sorted(tokens)
    random_.shuffle(shuffled)
    return letters, shuffled

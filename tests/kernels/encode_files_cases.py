"""Texts, and what shards hold, for the tests of encode_files."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from tapelm.shards import verify_shards
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


def trained() -> Tokenizer:
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

"""Damaged files, a thousand of each kind: a ValueError that names the file, or a tokenizer that works.

A crash ends the test run, and a hang is shown by the clock.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapelm._shard_writer import MANIFEST
from tapelm.loader import TokenLoader
from tapelm.shards import verify_shards, write_shards
from tapelm.tokenizer import Tokenizer
from tests.kernels.tokenizer_cases import END, finance_text, rank_file, tokens_of

MUTANTS = 1000
SECONDS_EACH = 5.0
NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"4294967295",
    b"4294967296",
    b"18446744073709551615",
    b"9" * 30,
    b"null",
    b'""',
)


def mutate(content: bytes, random_: random.Random) -> bytes:
    """One to three of: bits, bytes, pieces cut, doubled or moved, numbers replaced, a cut end."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(data) + 1)
        length = random_.choice([1, 2, 8, 100, len(data) // 3])
        piece = bytes(data[at : at + length])
        match random_.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << random_.randrange(8)
            case 1:
                data[at : at + 1] = random_.randbytes(random_.choice([0, 1, 8]))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = piece
            case 4:
                to = random_.randrange(len(data) + 1)
                data[to : to + len(piece)] = piece
            case 5:
                del data[at:]
            case 6:
                digits = [i for i in range(at, min(at + 400, len(data))) if 48 <= data[i] < 58]
                if digits:
                    data[digits[0] : digits[0] + random_.randint(1, 4)] = random_.choice(NUMBERS)
            case _:
                lines = bytes(data).split(b"\n")
                random_.shuffle(lines) if random_.random() < 0.1 else lines.insert(
                    random_.randrange(len(lines)), random_.choice(lines)
                )
                data = bytearray(b"\n".join(lines))
    return bytes(data)


def damage(path: Path, load: Callable[[], object], seed: int) -> tuple[int, int]:
    """How many mutants of a file were refused, with an error that names its place, and how many accepted."""
    content = path.read_bytes()
    random_ = random.Random(seed)
    refused = accepted = 0
    while refused + accepted < MUTANTS:
        mutant = mutate(content, random_)
        if mutant == content:
            continue
        path.write_bytes(mutant)
        start = time.perf_counter()
        try:
            load()
        except ValueError as error:
            assert str(path.parent) in str(error)
            refused += 1
        else:
            accepted += 1
        assert time.perf_counter() - start < SECONDS_EACH
    path.write_bytes(content)
    load()
    return refused, accepted


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([finance_text(1, 300)], 330)


def check(tokenizer: Tokenizer) -> None:
    """A tokenizer that was loaded must work."""
    for text in ("The Fed rose 0.25% in 2026…\r\n  日本 naïve", bytes(range(256))):
        content = text.encode() if isinstance(text, str) else text
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            assert "special token" in str(error)
            ids = tokenizer.encode(text, allow_special=True)
        assert tokenizer.decode_bytes(ids) == content


def test_tokenizer_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    refused, accepted = damage(path, lambda: check(Tokenizer.load(path)), 1)
    assert refused > 500 and accepted > 10


def test_tiktoken_ranks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(rank_file(tokens_of(tokenizer)))
    refused, accepted = damage(path, lambda: check(Tokenizer.load(path, pretokenizer="llama3")), 2)
    assert refused > 500 and accepted > 10


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_gpt2_files(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"], indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    (tmp_path / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    refused, accepted = damage(tmp_path / name, lambda: check(Tokenizer.load(tmp_path)), 3)
    assert refused > 500 and accepted > 10


def read_all(directory: Path) -> None:
    """Open shards and read batches; their values do not count, as only verify_shards compares hashes."""
    loader = TokenLoader(directory, 2, 16)
    for _ in range(min(len(loader), 20)):
        next(loader)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 999, size, dtype=np.uint32) for size in (70, 1, 0, 40, 90)]
    write_shards(documents, tmp_path / "x", vocab_size=1000, end_of_text=999, shard_tokens=128)
    return tmp_path / "x"


def test_shard_files(shards: Path) -> None:
    path = shards / "shard-00000.bin"
    refused, accepted = damage(path, lambda: read_all(shards), 4)
    assert refused > 500 and accepted > 10


def test_shard_hashes(shards: Path) -> None:
    refused, accepted = damage(shards / "shard-00001.bin", lambda: verify_shards(shards), 5)
    assert (refused, accepted) == (MUTANTS, 0)


def test_shard_headers(shards: Path) -> None:
    """Damage within the 64 bytes that say how much is to be read."""
    path = shards / "shard-00000.bin"
    content = path.read_bytes()
    random_ = random.Random(6)
    for _ in range(MUTANTS):
        mutant = bytearray(content)
        for _ in range(random_.randint(1, 2)):
            at = random_.randrange(0, 64, 4)
            value = random_.choice([0, 1, 2, 4, 8, 2**31, 2**32 - 1, random_.getrandbits(32)])
            mutant[at : at + 4] = value.to_bytes(4, "little")
        path.write_bytes(mutant)
        try:
            read_all(shards)
        except ValueError as error:
            assert str(shards) in str(error)


def test_manifests(shards: Path) -> None:
    def load() -> None:
        read_all(shards)
        verify_shards(shards)

    refused, accepted = damage(shards / MANIFEST, load, 7)
    assert refused > 500 and accepted > 10


def test_special_tokens_and_bytes_may_not_be_lost(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Removing any one byte, with everything made of it, is refused in every format."""
    tokens = tokens_of(tokenizer)
    path = tmp_path / "x.tiktoken"
    for byte in range(256):
        path.write_bytes(rank_file([token for token in tokens if bytes([byte]) not in token]))
        with pytest.raises(ValueError, match=f"no token for byte {byte}:"):
            Tokenizer.load(path, pretokenizer="gpt2", special_tokens={END: 5000})

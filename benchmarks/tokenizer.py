"""Encoding and training against gigatoken, tiktoken and Hugging Face `tokenizers`, taken in turn.

Cold is the first pass of a new tokenizer over the text, warm the next pass of the same one; loading is
part of neither. Every peer gets our vocabulary and documents, and its ids are compared before it is timed.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row
from gpt.cli import UserError
from tapelm._tokenizer_json import CHARACTER_OF_BYTE, GPT2_PATTERN
from tapelm.tokenizer import Tokenizer

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
VOCAB_SIZE = 32_768
THREADS = (1, 2)
# Slower than this against ours, a peer is measured once: a round of it would take minutes.
SLOW = ("tokenizers", "tiktoken")

Encoder = Callable[[list[str], int], Any]  # (documents, threads) -> the peer's own result


def documents(path: Path | None) -> list[str]:
    """Texts of a .jsonl(.gz) file (field "text"), of a plain file, or of all files of a directory of such."""
    path = path or CORPORA
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith((".jsonl", ".jsonl.gz", ".txt")))
    else:
        files = [path] if path.is_file() else []
    texts: list[str] = []
    for file in files:
        opened = gzip.open if file.suffix == ".gz" else open
        with opened(file, "rt", encoding="utf-8") as lines:
            if ".jsonl" in file.name:
                texts += [json.loads(line)["text"] for line in lines]
            else:
                texts.append(lines.read())
    if not texts:
        raise UserError(
            f"no documents at {path}: give --text a .txt, .jsonl or .jsonl.gz file or a directory"
        )
    return texts


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep the process to `count` cores, so that a peer without a thread option cannot take more.

    The pool of `tokenizers` keeps the size it had at first: for one thread it is told to stay out of it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def ours(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    tokenizer = Tokenizer.load(path)
    return lambda texts, threads: tokenizer.encode_batch(texts, threads=threads), np.concatenate


def gigatoken(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    module, awkward = importlib.import_module("gigatoken"), importlib.import_module("awkward")
    tokenizer = module.Tokenizer.from_json(path.read_bytes())
    return (
        lambda texts, threads: tokenizer.encode_batch(texts, parallel=threads > 1),
        lambda result: awkward.to_numpy(awkward.flatten(result)),
    )


def tiktoken(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    module = importlib.import_module("tiktoken")
    byte_of = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}
    config = json.loads(path.read_bytes())
    specials = {token["content"]: token["id"] for token in config["added_tokens"]}
    ranks = {
        bytes(byte_of[character] for character in token): index
        for token, index in config["model"]["vocab"].items()
        if token not in specials
    }
    encoding = module.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return (
        lambda texts, threads: encoding.encode_ordinary_batch(texts, num_threads=threads),
        lambda result: np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in result]),
    )


def tokenizers(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
    return (
        lambda texts, _: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        lambda result: np.concatenate([np.asarray(one.ids, dtype=np.uint32) for one in result]),
    )


PEERS = {"tapelm": ours, "gigatoken": gigatoken, "tiktoken": tiktoken, "tokenizers": tokenizers}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def row(
    subject: str, variant: str, seconds: Sequence[float], ours_: Sequence[float], size: int, copy: float
) -> Row:
    """`copy` is the time to copy the text once, the ceiling."""
    median = statistics.median(seconds)
    pairs = zip(ours_, seconds, strict=False)
    return Row(
        subject=subject,
        variant=variant,
        shape=f"{size / 1e6:.1f} MB",
        dtype="uint32",
        device=platform.machine(),
        median_ms=1e3 * median,
        fastest_ms=1e3 * min(seconds),
        slowest_ms=1e3 * max(seconds),
        ratio_vs={"tapelm": statistics.median([own / peer for own, peer in pairs])},
        ceiling=f"{size / copy / 1e9:.1f} GB/s copy",
        fraction_of_ceiling=copy / median,
        extra={"megabytes_per_second": size / median / 1e6},
    )


def available() -> tuple[list[str], list[str]]:
    """Peers that can be imported, and a line for each that cannot."""
    found, missing = [], []
    for name in PEERS:
        try:
            importlib.import_module(name)
            found.append(name)
        except ImportError as error:
            missing.append(f"{name} is not measured: {error} (pip install tapelm[peers])")
    return found, missing


def measure(path: Path | None, rounds: int) -> list[Row]:
    """Rows of encoding, cold and warm, on each number of threads, and of training."""
    texts = documents(path)
    raw = "".join(texts).encode()
    found, missing = available()
    for line in missing:
        print(line)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "tokenizer.json"
        Tokenizer.train(texts, VOCAB_SIZE).save(vocabulary)
        make_ours, flat = ours(vocabulary)
        expected = flat(make_ours(texts, 1))
        for threads in THREADS:
            with cores(threads):
                rows += _encoding(vocabulary, texts, len(raw), threads, rounds, found, expected)
    return rows + _training(texts, len(raw), rounds, found)


def _encoding(
    vocabulary: Path,
    texts: list[str],
    size: int,
    threads: int,
    rounds: int,
    found: list[str],
    expected: np.ndarray,
) -> list[Row]:
    seconds: dict[str, dict[str, list[float]]] = {
        state: {name: [] for name in found} for state in ("cold", "warm")
    }
    source = np.zeros(size, dtype=np.uint8)
    copies = []
    for name in found:
        encode, flat = PEERS[name](vocabulary)
        if not np.array_equal(flat(encode(texts, threads)), expected):
            raise UserError(f"{name} gives other ids, nothing was timed")
    for done in range(rounds):
        for name in found:
            if done > 0 and name in SLOW:
                continue
            encode, _ = PEERS[name](vocabulary)
            for state in ("cold", "warm"):
                seconds[state][name].append(timed(lambda run=encode: run(texts, threads))[0])
        copies.append(timed(source.copy)[0])
    copy = statistics.median(copies)
    return [
        row(
            f"encode {state}, {threads} thr", name, seconds[state][name], seconds[state]["tapelm"], size, copy
        )
        for state in ("cold", "warm")
        for name in found
    ]


def _training(texts: list[str], size: int, rounds: int, found: list[str]) -> list[Row]:
    own = [timed(lambda: Tokenizer.train(texts, VOCAB_SIZE))[0] for _ in range(min(rounds, 3))]
    copy = timed(np.zeros(size, dtype=np.uint8).copy)[0]
    rows = [row(f"train {VOCAB_SIZE}", "tapelm", own, own, size, copy)]
    if "tokenizers" in found:
        module = importlib.import_module("tokenizers")
        tokenizer = module.Tokenizer(module.models.BPE())
        tokenizer.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = module.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=module.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        seconds, _ = timed(lambda: tokenizer.train_from_iterator(texts, trainer))
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "tokenizer.json"
            Tokenizer.train(texts, VOCAB_SIZE).save(saved)
            merges = json.loads(saved.read_bytes())["model"]["merges"]
        if merges != json.loads(tokenizer.to_str())["model"]["merges"]:
            raise UserError("tokenizers learns other merges")
        rows.append(row(f"train {VOCAB_SIZE}", "tokenizers", [seconds], own, size, copy))
    return rows

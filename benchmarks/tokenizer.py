"""Loading, encoding and training against gigatoken, tiktoken and Hugging Face `tokenizers`, taken in turn.

Every timing of an encoder comes from a process of its own, kept to as many cores as it has threads: "load"
reads the tokenizer.json, "cold" is the first pass over the text, "warm" the next ones (median; of slow peers
one over a part of the text). Importing is part of none. Each takes the kind of text that suits it best (bytes
for gigatoken and for ours), our vocabulary and documents, and its ids are compared.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, in_fresh_process, relative_error
from gpt.cli import UserError
from tapelm._tokenizer_json import CHARACTER_OF_BYTE, GPT2_PATTERN
from tapelm.tokenizer import Tokenizer

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "corpora"
VOCAB_SIZE = 32_768
THREADS = (1, 2)
WARM_PASSES = 3
# Passes of these take seconds: they encode in so many rounds, and load in all. Their warm pass is over every
# SLOW_PART-th document, and its time counts by bytes.
SLOW_ROUNDS = {"tokenizers": 1, "tiktoken": 3}
SLOW_PART = 4
TAKES_BYTES = ("tapelm", "gigatoken")

Encoder = Callable[[Sequence[str | bytes], int], Any]  # (documents, threads) -> the peer's own result


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
            try:
                if ".jsonl" in file.name:
                    texts += [json.loads(line)["text"] for line in lines]
                else:
                    texts.append(lines.read())
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise UserError(f'{file} is not UTF-8 text or JSON lines with a "text": {error!r}') from error
    if not any(texts):
        raise UserError(
            f"no documents at {path}: give --text a .txt, .jsonl or .jsonl.gz file or a directory"
        )
    return texts


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


@functools.cache
def ranks_of(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ids of the tokens and of the special tokens of a tokenizer.json, as tiktoken takes them."""
    byte_of = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}
    config = json.loads(path.read_bytes())
    specials = {token["content"]: token["id"] for token in config["added_tokens"]}
    ranks = {
        bytes(byte_of[character] for character in token): index
        for token, index in config["model"]["vocab"].items()
        if token not in specials
    }
    return ranks, specials


def tiktoken(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    module = importlib.import_module("tiktoken")
    ranks, specials = ranks_of(path)
    encoding = module.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials)

    def encode(texts: Sequence[Any], threads: int) -> list[np.ndarray]:
        one = functools.partial(encoding.encode_to_numpy, disallowed_special=())
        if threads == 1:
            return [one(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, texts))

    return encode, np.concatenate


def tokenizers(path: Path) -> tuple[Encoder, Callable[[Any], np.ndarray]]:
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
    return (
        lambda texts, _: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        lambda result: np.concatenate([np.asarray(one.ids, dtype=np.uint32) for one in result]),
    )


PEERS = {"tapelm": ours, "gigatoken": gigatoken, "tiktoken": tiktoken, "tokenizers": tokenizers}
MODULES = {name: (name, "awkward") if name == "gigatoken" else (name,) for name in PEERS}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def one_load(name: str, vocabulary: Path, threads: int) -> dict[str, float]:
    """Seconds of loading."""
    return {"load": timed(_prepared(name, vocabulary, threads))[0]}


def one_run(name: str, vocabulary: Path, text: Path, threads: int) -> tuple[dict[str, float], str]:
    """Seconds of loading, of the first and of later passes, and the SHA-256 of the ids."""
    texts: list[str | bytes] = json.loads(text.read_bytes())
    if name in TAKES_BYTES:
        texts = [one.encode() for one in texts if isinstance(one, str)]
    load, (encode, flat) = timed(_prepared(name, vocabulary, threads))
    cold, result = timed(lambda: encode(texts, threads))
    ids = hashlib.sha256(np.asarray(flat(result), dtype=np.uint32).tobytes()).hexdigest()
    if name in SLOW_ROUNDS:
        part = texts[::SLOW_PART]
        warm = timed(lambda: encode(part, threads))[0] * _bytes(texts) / _bytes(part)
    else:
        warm = statistics.median(timed(lambda: encode(texts, threads))[0] for _ in range(WARM_PASSES))
    return {"load": load, "cold": cold, "warm": warm}, ids


def _bytes(texts: Sequence[str | bytes]) -> int:
    return sum(len(one.encode() if isinstance(one, str) else one) for one in texts)


def _prepared(
    name: str, vocabulary: Path, threads: int
) -> Callable[[], tuple[Encoder, Callable[[Any], np.ndarray]]]:
    """What loads the tokenizer, in a process that is kept to its cores and has imported what it needs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for module in MODULES[name]:
        importlib.import_module(module)
    if name == "tiktoken":
        ranks_of(vocabulary)  # whose own files hold them as they are
    return lambda: PEERS[name](vocabulary)


def row(
    subject: str, variant: str, seconds: Sequence[float], ours_: Sequence[float], size: int, copy: float
) -> Row:
    """`copy` is the time to copy the text once, the ceiling.

    A peer that was measured in fewer rounds than ours is compared with all of ours.
    """
    median = statistics.median(seconds)
    if len(seconds) == len(ours_):
        ratios = [own / peer for own, peer in zip(ours_, seconds, strict=True)]
        error = relative_error(ratios)
    else:
        ratios = [own / median for own in ours_]
        error = math.hypot(relative_error(ours_), relative_error(seconds))
    return Row(
        subject=subject,
        variant=variant,
        shape=f"{size / 1e6:.1f} MB",
        dtype="uint32",
        device=platform.machine(),
        median_ms=1e3 * median,
        fastest_ms=1e3 * min(seconds),
        slowest_ms=1e3 * max(seconds),
        ratio_vs={"tapelm": statistics.median(ratios)},
        ceiling=f"{size / copy / 1e9:.1f} GB/s copy",
        fraction_of_ceiling=copy / median,
        extra={"megabytes_per_second": size / median / 1e6, "ratio_error": error},
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
    """Rows of loading and encoding, cold and warm, on each number of threads, and of training."""
    texts = documents(path)
    size = sum(len(text.encode()) for text in texts)
    found, missing = available()
    for line in missing:
        print(line)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, text = Path(folder) / "tokenizer.json", Path(folder) / "text.json"
        Tokenizer.train(texts, VOCAB_SIZE).save(vocabulary)
        text.write_text(json.dumps(texts), encoding="utf-8")
        for threads in THREADS:
            rows += _encoding(vocabulary, text, size, threads, rounds, found)
        return rows + _training(texts, vocabulary, size, rounds, found)


def _encoding(
    vocabulary: Path, text: Path, size: int, threads: int, rounds: int, found: list[str]
) -> list[Row]:
    runs: dict[str, list[Mapping[str, float]]] = {name: [] for name in found}
    source = np.zeros(size, dtype=np.uint8)
    copies = []
    modules = [module for name in found for module in MODULES[name]]
    fresh = functools.partial(in_fresh_process, one_run, modules=modules)
    expected = fresh("tapelm", vocabulary, text, threads)[1]
    for done in range(rounds):
        for name in found:
            if done >= SLOW_ROUNDS.get(name, rounds):
                runs[name].append(in_fresh_process(one_load, name, vocabulary, threads, modules=modules))
                continue
            seconds, ids = fresh(name, vocabulary, text, threads)
            if ids != expected:
                raise UserError(f"{name} gives other ids, its time means nothing")
            runs[name].append(seconds)
        copies.append(timed(source.copy)[0])
    copy = statistics.median(copies)
    return [
        row(
            f"{state}, {threads} thr",
            name,
            [run[state] for run in runs[name] if state in run],
            [run[state] for run in runs["tapelm"]],
            size,
            copy,
        )
        for state in ("load", "cold", "warm")
        for name in found
    ]


def _training(texts: list[str], vocabulary: Path, size: int, rounds: int, found: list[str]) -> list[Row]:
    """Ours in every round, `tokenizers` in the first, with the same merges."""
    copy = timed(np.zeros(size, dtype=np.uint8).copy)[0]
    own: list[float] = []
    theirs: list[float] = []
    for done in range(min(rounds, 3)):
        own.append(timed(lambda: Tokenizer.train(texts, VOCAB_SIZE))[0])
        if "tokenizers" not in found or done > 0:
            continue
        module = importlib.import_module("tokenizers")
        tokenizer = module.Tokenizer(module.models.BPE())
        tokenizer.pre_tokenizer = module.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = module.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=module.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        theirs.append(timed(lambda: tokenizer.train_from_iterator(texts, trainer))[0])  # noqa: B023
        merges = json.loads(vocabulary.read_bytes())["model"]["merges"]
        if merges != json.loads(tokenizer.to_str())["model"]["merges"]:
            raise UserError("tokenizers learns other merges")
    rows = [row(f"merges {VOCAB_SIZE}", "tapelm", own, own, size, copy)]
    if theirs:
        rows.append(row(f"merges {VOCAB_SIZE}", "tokenizers", theirs, own, size, copy))
    return rows

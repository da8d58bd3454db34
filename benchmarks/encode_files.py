"""JSON lines to shards on disk against encoding the same texts, already in memory, both on all cores.

Each timing comes from a process of its own: "once" is its first pass over the text, "again" the median of the
next ones. The file is in the page cache, and the shards go to where temporary files do; the texts in memory
are out of their JSON already. The ceiling is a copy of the text.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, in_fresh_process
from benchmarks.tokenizer import CORPORA, VOCAB_SIZE, WARM_PASSES, documents, timed
from gpt.cli import UserError
from gpt.corpus import SHARD_HEADER_BYTES
from tapelm import Tokenizer
from tapelm._shard_writer import token_dtype

MADE_UP_BYTES = 48_000_000
MEMORY, FILES = "encode_batch in memory", "file to shards"


def measure(text: Path | None, rounds: int) -> list[Row]:
    """Rows of both, once and again; of made-up words where there is no text."""
    made_up = text is None and not CORPORA.is_dir()
    texts = made_up_texts() if made_up else documents(text)
    size = sum(len(one.encode()) for one in texts)
    source = np.zeros(size, dtype=np.uint8)
    seconds: dict[str, list[list[float]]] = {MEMORY: [], FILES: []}
    copies = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        Tokenizer.train(texts, VOCAB_SIZE).save(root / "tokenizer.json")
        lines = "".join(json.dumps({"text": one}) + "\n" for one in texts)
        (root / "text.jsonl").write_text(lines, encoding="utf-8")
        _compare(root, texts)
        for done in range(rounds):
            for name in sorted(seconds, reverse=done % 2 == 1):
                seconds[name].append(in_fresh_process(passes, name, root))
            copies.append(timed(source.copy)[0])
    copy = statistics.median(copies)
    return [
        Row(
            subject="encode_files",
            variant=name,
            shape=f"{'made-up words, ' * made_up}{size / 1e6:.0f} MB, {len(texts)} lines, {state}",
            dtype="text",
            device="cpu",
            median_ms=1e3 * statistics.median(own),
            fastest_ms=1e3 * min(own),
            slowest_ms=1e3 * max(own),
            ratio_vs={MEMORY: statistics.median([a / b for a, b in zip(base, own, strict=True)])},
            ceiling=f"{size / copy / 1e9:.1f} GB/s copy",
            fraction_of_ceiling=copy / statistics.median(own),
            extra={"megabytes_per_second": size / statistics.median(own) / 1e6},
        )
        for number, state in enumerate(("once", "again"))
        for base in [[run[number] for run in seconds[MEMORY]]]
        for name in seconds
        for own in [[run[number] for run in seconds[name]]]
    ]


def passes(name: str, root: Path) -> list[float]:
    """Seconds of the first pass, and the median of the next ones."""
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    source = root / "text.jsonl"
    outputs = Path(tempfile.mkdtemp(dir=root))  # in which nothing is replaced: that would be timed, too
    if name == MEMORY:
        with source.open("rb") as lines:
            texts = [json.loads(line)["text"].encode() for line in lines]
        steps: list[Callable[[], object]] = [
            functools.partial(tokenizer.encode_batch, texts) for _ in range(1 + WARM_PASSES)
        ]
    else:
        steps = [
            functools.partial(tokenizer.encode_files, [source], outputs / str(number))
            for number in range(1 + WARM_PASSES)
        ]
    os.sync()  # what others have written is not waited for here
    first, *others = (timed(step)[0] for step in steps)
    return [first, statistics.median(others)]


def _compare(root: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    end = tokenizer.special_tokens["<|endoftext|>"]
    expected = np.concatenate([np.append(ids, end) for ids in tokenizer.encode_batch(texts)])
    tokenizer.encode_files([root / "text.jsonl"], root / "compared")
    stored = np.fromfile(
        root / "compared" / "shard-00000.bin",
        token_dtype(tokenizer.vocab_size),
        expected.size,
        offset=SHARD_HEADER_BYTES,
    )
    if not np.array_equal(stored, expected):
        raise UserError("encode_files and encode_batch differ, nothing was timed")


def made_up_texts() -> list[str]:
    """Random words, a line end after each dozen: in JSON an escape, so that none is taken as it stands."""
    generator = np.random.default_rng(0)
    letters = np.array([*"etaoinshrdlucmfwypvbg"])
    words = ["".join(generator.choice(letters, n)) for n in generator.integers(1, 12, 30_000)]
    ranks = (30_000 ** generator.random(MADE_UP_BYTES // 6)).astype(np.int64) - 1
    return [
        "\n".join(" ".join(words[rank] for rank in part[i : i + 12]) for i in range(0, len(part), 12))
        for part in np.array_split(ranks, MADE_UP_BYTES // 6_000)
    ]

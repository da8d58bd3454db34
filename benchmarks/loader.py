"""The batch loader against torch.utils.data.DataLoader and a memmap read per window; opening.

A timing takes batches of TOKENS tokens in all: some milliseconds also of ours, as within less the scheduler
may not yet have found the thread that prepares them a core of its own. Before timing, the peers' windows are
found equal to ours. The ceiling is a copy that writes as many bytes as the batches have (inputs, targets,
document ids: 20 per token).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks import encode_files, train
from benchmarks.harness import Case, Row, measure
from gpt.cli import UserError
from gpt.corpus import SHARD_HEADER_BYTES
from tapelm import TokenLoader, _text, write_shards
from tapelm._shard_writer import MANIFEST
from tapelm.loader import ORDERS

TOKENS = 8 << 20  # a timing of batches
# Of those whose processes send them, which takes milliseconds a batch. Up to four batches wait when a timing
# begins, made while the others were timed: at most 6% of what is timed.
WORKER_TOKENS, LEAST_BATCHES = 1 << 20, 64
VOCAB, END = 16_384, 0
Step = Callable[[], object]


class Windows(Dataset):
    """Map-style: window i of a memmap, as (inputs, targets) of shape (T,) int64."""

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self._tokens, self._seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self._seq_len
        window = torch.from_numpy(self._tokens[begin : begin + self._seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]


class Gathered(Windows):
    """The same windows, as many as asked for at once: (B, T) each."""

    def __getitem__(self, indices: Any) -> tuple[torch.Tensor, torch.Tensor]:
        places = np.asarray(indices)[:, None] * self._seq_len + np.arange(self._seq_len + 1)
        windows = torch.from_numpy(self._tokens[places].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def bulk(dataset: Gathered, batch_size: int) -> Iterator[list[torch.Tensor]]:
    """DataLoader's bulk loading: the sampler gives batches of indices."""
    sampler = BatchSampler(RandomSampler(dataset), batch_size, drop_last=True)
    while True:
        yield from DataLoader(dataset, batch_size=None, sampler=sampler)


def gather(dataset: Gathered, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A new permutation in every epoch, a gather for every batch: the least that NumPy needs."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(dataset))
        for begin in range(0, len(dataset) - batch_size + 1, batch_size):
            yield dataset[order[begin : begin + batch_size]]


def endless(dataset: Windows, batch_size: int, workers: int) -> Iterator[list[torch.Tensor]]:
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        yield from loader


def memmap_batches(tokens: np.ndarray, batch_size: int, seq_len: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Windows at random positions, each read by itself, as small training scripts do it."""
    generator = np.random.default_rng(0)
    while True:
        starts = generator.integers(0, len(tokens) - seq_len, batch_size)
        inputs = [torch.from_numpy(tokens[at : at + seq_len].astype(np.int64)) for at in starts]
        targets = [torch.from_numpy(tokens[at + 1 : at + seq_len + 1].astype(np.int64)) for at in starts]
        yield torch.stack(inputs), torch.stack(targets)


def measure_all(rounds: int, preset: str, batch_size: int, text: Path | None) -> list[Row]:
    """Rows of batches, for the shape of a preset's training step, of opening and of encoding `text`."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        step = train.Step(preset, "optimized", batch_size, torch.device("cpu"))
        seconds = []
        for _ in range(3):
            seconds.append(_timed(step))
        rows = []
        for shape in ((batch_size, step.config.block_size), (64, 1024)):
            rows += _batches(root / f"{shape[1]}", *shape, rounds)
        for row in rows[: len(rows) // 2]:
            row.extra["fraction_of_training_step"] = 1 / row.extra["batches_per_second"] / min(seconds)
        return rows + _opening(root / "open") + encode_files.measure(text, rounds)


def _timed(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _batches(directory: Path, batch_size: int, seq_len: int, rounds: int) -> list[Row]:
    generator = np.random.default_rng(0)
    documents = (
        generator.integers(1, VOCAB, n, dtype=np.uint32) for n in generator.integers(1, 1000, 40_000)
    )
    manifest = write_shards(documents, directory, vocab_size=VOCAB, end_of_text=END)
    tokens = np.memmap(
        directory / "shard-00000.bin", np.uint16, "r", SHARD_HEADER_BYTES, (manifest["shards"][0]["tokens"],)
    )
    dataset, gathered = Windows(tokens, seq_len), Gathered(tokens, seq_len)
    sequential = TokenLoader(directory, batch_size, seq_len, order="sequential")
    peers: dict[str, Iterator[object]] = {
        "DataLoader, 0 workers": endless(dataset, batch_size, 0),
        "DataLoader, bulk loading": bulk(gathered, batch_size),
        "NumPy gather": gather(gathered, batch_size),
        "memmap per window": memmap_batches(tokens, batch_size, seq_len),
    }
    for order in ORDERS:
        peers[f"ours, {order}"] = TokenLoader(directory, batch_size, seq_len, order=order)  # type: ignore[arg-type]
    for number, batch in zip(range(20), sequential, strict=False):
        for row in range(batch_size):
            inputs, targets = dataset[number * batch_size + row]
            if not (torch.equal(batch.inputs[row], inputs) and torch.equal(batch.targets[row], targets)):
                raise UserError("the loader's windows differ from the memmap's, nothing was timed")
    for ours, theirs in zip(gathered[[7, 3]], zip(dataset[7], dataset[3], strict=True), strict=True):
        if not torch.equal(ours, torch.stack(theirs)):
            raise UserError("the gathered windows differ from the memmap's, nothing was timed")
    shuffled = TokenLoader(directory, batch_size, seq_len, order="shuffled")
    for number, batch in zip(range(20), shuffled, strict=False):
        for row, index in enumerate(shuffled._loader.window_indices(number)):
            if not torch.equal(batch.inputs[row], dataset[index][0]):
                raise UserError("the shuffled loader's windows differ from the memmap's, nothing was timed")

    def steps(source: Iterator[object], batches: int) -> Step:
        def run() -> None:
            for _ in range(batches):
                next(source)

        return run

    def rows_of(sources: dict[str, Iterator[object]], tokens: int) -> list[Row]:
        batches = max(LEAST_BATCHES, tokens // (batch_size * seq_len))
        case = Case(
            subject="loader",
            shape=f"{batches} x {batch_size} x {seq_len}",
            dtype=torch.int64,
            variants={name: steps(source, batches) for name, source in sources.items()},
            bound="copy",
            work=2.0 * 20 * batch_size * seq_len * batches,
            agree=lambda ours, expected: None,  # checked above: the orders differ by design
        )

        measured = measure(case, torch.device("cpu"), rounds)
        for row in measured:
            row.extra["batches_per_second"] = 1e3 * batches / row.median_ms
            row.extra["tokens_per_second"] = 1e3 * batches * batch_size * seq_len / row.median_ms
        return measured

    rows = rows_of(peers, TOKENS)
    # Apart, as its processes would stay and disturb the others.
    workers: dict[str, Iterator[object]] = {
        f"DataLoader, {count} workers": endless(dataset, batch_size, count) for count in (0, 2)
    }
    return rows + rows_of(workers, WORKER_TOKENS)[1:]


OPEN = """
import sys, time
import torch
from tapelm import TokenLoader
order = sys.argv[2]
def resident(what):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))
before, seconds = resident("VmHWM"), []
for _ in range(9):
    started = time.perf_counter()
    loader = TokenLoader(sys.argv[1], 16, 256, order=order)
    seconds.append(time.perf_counter() - started)
print(*sorted(seconds), resident("VmHWM") - before)
"""


def _opening(directory: Path) -> list[Row]:
    """2^30 tokens in 16 shards, sparse but for the starts of 1.6 million documents of lognormal lengths; in
    fresh processes, where the memory is the most that was resident."""
    directory.mkdir()
    tokens, documents = 2**26, 100_000
    generator = np.random.default_rng(0)
    entries = []
    for number in range(16):
        path = directory / f"shard-{number:05d}.bin"
        path.write_bytes(_text.shard_header(2, tokens, documents, VOCAB, END))
        os.truncate(path, SHARD_HEADER_BYTES + 2 * tokens)
        with path.open("ab") as file:
            ends = np.cumsum(generator.lognormal(0.0, 1.0, documents))
            starts = np.concatenate([[0.0], ends[:-1] / ends[-1]]) * (tokens - documents)
            file.write((starts.astype("<u8") + np.arange(documents, dtype="<u8")).data)
        entries.append({"file": path.name, "tokens": tokens, "documents": documents, "sha256": ""})
    manifest = {"format": "tapelm-shards", "version": 2, "vocab_size": VOCAB, "end_of_text": END}
    manifest |= {"tokens": 16 * tokens, "documents": 16 * documents, "shards": entries}
    (directory / MANIFEST).write_text(json.dumps(manifest))
    return [_opened(directory, order) for order in ("shuffled", "packed")]


def _opened(directory: Path, order: str) -> Row:
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(directory), order],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(_text.__file__).parents[1])},
    )
    *seconds, resident = map(float, done.stdout.split())
    median = seconds[len(seconds) // 2]
    return Row(
        subject="open",
        variant=f"ours, {order}",
        shape="2^30 tokens, 16 shards",
        dtype="uint16",
        device="cpu",
        median_ms=1e3 * median,
        fastest_ms=1e3 * seconds[0],
        slowest_ms=1e3 * seconds[-1],
        ratio_vs={f"ours, {order}": 1.0},
        ceiling=f"{resident / 1e6:.1f} MB at most",
        fraction_of_ceiling=0.0,
        extra={"peak_resident_bytes": resident},
    )

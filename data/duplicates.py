"""Near-duplicates among any number of documents, in memory that does not grow with their text.

Shingles are runs of five words, sketches MinHash signatures of 128 values (rensa), candidates the documents
that agree in one of sixteen bands of eight, and duplicates those candidates whose signatures agree in at
least 80% of their values: the estimate of Jaccard similarity. A pair at 0.8 becomes a candidate with
probability 0.94, one at 0.9 with 0.9999. Signatures and band keys go to files; one band at a time is sorted.

Of duplicates the one that was released first stays, so that no later copy can sit behind a cut of the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SHINGLE_WORDS = 5
VALUES = 128
BANDS = 16
THRESHOLD = 0.8
SEED = 42
BATCH = 1024  # documents whose shingles are hashed and sketched at a time
COMPARED = 1 << 16  # pairs of signatures compared at a time
KNOWN_WORDS = 1 << 20  # whose hashes are kept
MULTIPLIERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(VALUES)], dtype=np.uint64)
UNDATED = np.iinfo(np.int32).max  # the rank of a day for documents without one: after all others


class _Words(dict[str, int]):
    """64-bit hashes of words, the same in every process."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        value = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        self[word] = value
        return value


class NearDuplicates:
    """Sketches of the documents added so far; `find` says which are copies."""

    def __init__(self, folder: Path) -> None:
        """Keep files in `folder`, which the caller removes. Raises ImportError where rensa is missing."""
        self._sketch: Any = import_module("rensa").RMinHash.digest_matrix_from_flat_token_hashes
        folder.mkdir(parents=True, exist_ok=True)
        self._files = ExitStack()
        names = ("signatures.bin", *(f"band-{band:02}.bin" for band in range(BANDS)))
        opened = (self._files.enter_context(open(folder / name, "w+b")) for name in names)  # noqa: SIM115
        self._signatures, *self._bands = opened
        self._words = _Words()
        self._waiting: list[np.ndarray] = []
        self.documents = 0

    def add(self, text: str) -> None:
        """Sketch one document."""
        self._waiting.append(self._shingles(text))
        self.documents += 1
        if len(self._waiting) == BATCH:
            self._write()

    def find(self, days: np.ndarray) -> np.ndarray:
        """Which documents are copies of one released earlier or, on the same day, added earlier.

        days (documents,) int32: release days in any unit, UNDATED where unknown. Returns (documents,) bool.
        """
        self._write()
        copies = np.zeros(self.documents, dtype=bool)
        if not self.documents:
            return copies
        for file in (self._signatures, *self._bands):
            file.flush()
        signatures = np.memmap(
            self._signatures.name, dtype=np.uint32, mode="r", shape=(self.documents, VALUES)
        )
        order = np.argsort(days, kind="stable")
        for file in self._bands:
            keys = np.fromfile(file.name, dtype=np.uint64)[order]
            by_key = np.argsort(keys, kind="stable")  # within a key by day, then as added
            keys = keys[by_key]
            same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
            if not same.size:
                continue
            first = np.arange(keys.size)
            first[same] = 0
            first = np.maximum.accumulate(first)
            documents = order[by_key]
            for others in (same - 1, first[same]):
                _mark(copies, signatures, documents[others], documents[same])
        return copies

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _shingles(self, text: str) -> np.ndarray:
        words = text.lower().split()
        hashes = np.fromiter(map(self._words.__getitem__, words), np.uint64, len(words))
        count = max(1, hashes.size - SHINGLE_WORDS + 1)
        shingles = np.zeros(count, dtype=np.uint64)
        for position in range(min(SHINGLE_WORDS, hashes.size)):
            shingles += hashes[position : position + count] * MULTIPLIERS[position]
        return shingles

    def _write(self) -> None:
        if not self._waiting:
            return
        ends = np.cumsum([shingles.size for shingles in self._waiting], dtype=np.uint64)
        offsets: Sequence[int] = [0, *ends.tolist()]
        matrix = self._sketch(np.concatenate(self._waiting), offsets, VALUES, SEED)
        signatures = np.array(matrix.to_rows(), dtype=np.uint32)
        signatures.tofile(self._signatures)
        width = VALUES // BANDS
        bands = signatures.reshape(len(signatures), BANDS, width).astype(np.uint64)
        keys = (bands * MULTIPLIERS[1 : width + 1]).sum(axis=2, dtype=np.uint64)
        for file, column in zip(self._bands, keys.T, strict=True):
            np.ascontiguousarray(column).tofile(file)
        self._waiting = []


def _mark(copies: np.ndarray, signatures: np.ndarray, earlier: np.ndarray, later: np.ndarray) -> None:
    """Set `copies` where the signatures of a pair agree well enough; a pair is compared once."""
    open_pairs = np.flatnonzero(~copies[later])
    for start in range(0, open_pairs.size, COMPARED):
        pairs = open_pairs[start : start + COMPARED]
        agreement = (signatures[earlier[pairs]] == signatures[later[pairs]]).mean(axis=1)
        copies[later[pairs[agreement >= THRESHOLD]]] = True

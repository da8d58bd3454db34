"""Rows of a fixed number of tokens, filled with pieces of documents that do not see each other.

A document longer than a row is cut into pieces; each piece predicts the first token of the next one, so that
no target is lost. Pieces are never cut to fill a row: the longest goes first, each into the fullest row that
it fits (best fit decreasing). The rest of a row is padding, which counts as a document of its own.

Shapes: R rows, T tokens; ids, targets, positions, document_ids (R, T).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama_lora.dataset import IGNORED, Example


@dataclass(frozen=True)
class PackedBatch:
    """Rows for one forward pass, on the device. All (B, T); `tokens` counts what is not padding."""

    ids: Tensor  # int64
    targets: Tensor  # int64, IGNORED where nothing is learned
    positions: Tensor  # int64, from 0 in every piece
    document_ids: Tensor  # int32, differ between the pieces of a row
    tokens: int
    valid: int
    """Targets that are learned."""


def pieces_of(examples: Sequence[Example], block_size: int) -> list[Example]:
    """Every example in pieces of at most `block_size` tokens; those that teach nothing are left out."""
    pieces = []
    for example in examples:
        for start in range(0, len(example.ids), block_size):
            part = slice(start, start + block_size)
            if (example.targets[part] != IGNORED).any():
                pieces.append(Example(example.ids[part], example.targets[part]))
    return pieces


def assign_rows(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Best fit decreasing: indices of the pieces in each row, whose lengths sum to `block_size` at most."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[index], -1))
        if at == len(free):
            rows.append([index])
            left, row = block_size - lengths[index], len(rows) - 1
        else:
            left, row = free.pop(at)
            rows[row].append(index)
            left -= lengths[index]
        if left:
            bisect.insort(free, (left, row))
    return rows


class Rows:
    """All rows of a split in their fixed order; batches follow a permutation made of seed and epoch."""

    def __init__(self, examples: Sequence[Example], block_size: int, *, packing: bool, pad_id: int) -> None:
        self.pieces = pieces_of(examples, block_size)
        self.block_size, self.packing, self.pad_id = block_size, packing, pad_id
        lengths = [len(piece.ids) for piece in self.pieces]
        self.rows = (
            assign_rows(lengths, block_size) if packing else [[index] for index in range(len(lengths))]
        )
        self.tokens = sum(lengths)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return self.tokens / (len(self.rows) * self.block_size)

    def batches(self, batch_size: int, device: torch.device, limit: int = 0) -> Iterator[PackedBatch]:
        """The rows in order, for evaluation: spread evenly over the split where `limit` leaves some out."""
        chosen = np.arange(len(self.rows))
        if 0 < limit < len(chosen):
            chosen = np.linspace(0, len(self.rows) - 1, limit).round().astype(int)
        for start in range(0, len(chosen), batch_size):
            yield self.batch(chosen[start : start + batch_size], device)

    def training_batch(self, index: int, batch_size: int, seed: int, device: torch.device) -> PackedBatch:
        """Batch number `index` of an endless run over the epochs; the rows left over end each of them."""
        per_epoch = -(-len(self.rows) // batch_size)
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return self.batch(order[place * batch_size : (place + 1) * batch_size], device)

    def batch(self, chosen: Sequence[int] | np.ndarray, device: torch.device) -> PackedBatch:
        rows = [[self.pieces[index] for index in self.rows[row]] for row in chosen]
        return collate(rows, self.block_size if self.packing else 0, self.pad_id, device)


def collate(rows: Sequence[Sequence[Example]], width: int, pad_id: int, device: torch.device) -> PackedBatch:
    """The pieces of each row one after another, padded to `width`, or to the longest row if it is 0."""
    used = [sum(len(piece.ids) for piece in row) for row in rows]
    width = width or max(used)
    shape = len(rows), width
    ids, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions, documents = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row):
            part = slice(start, start + len(piece.ids))
            ids[r, part], targets[r, part] = piece.ids, piece.targets
            positions[r, part], documents[r, part] = np.arange(len(piece.ids)), number
            start += len(piece.ids)
        positions[r, start:], documents[r, start:] = np.arange(width - start), len(row)
    ids_t, targets_t, positions_t, documents_t = (
        torch.from_numpy(array).to(device) for array in (ids, targets, positions, documents)
    )
    valid = int((targets != IGNORED).sum())
    return PackedBatch(ids_t, targets_t, positions_t, documents_t, sum(used), valid)

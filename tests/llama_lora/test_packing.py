"""Nothing is lost, nothing overlaps, and order depends on seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.dataset import IGNORED, Example
from llama_lora.packing import Rows, assign_rows, pieces_of

CPU = torch.device("cpu")


def document(length: int, first: int = 0) -> Example:
    ids = np.arange(first, first + length, dtype=np.int64)
    return Example(ids, np.append(ids[1:], IGNORED))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 70), min_size=1, max_size=40), st.integers(4, 32))
def test_every_token_and_target_is_in_exactly_one_row(lengths: list[int], block_size: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]])
    documents = [document(n, start) for n, start in zip(lengths, starts, strict=True)]
    rows = Rows(documents, block_size, packing=True, pad_id=-1)
    seen, pairs = [], set()
    for batch in rows.batches(3, CPU):
        for ids, targets, positions, numbers in zip(
            batch.ids, batch.targets, batch.positions, batch.document_ids, strict=True
        ):
            real = ids >= 0
            seen += ids[real].tolist()
            pairs |= {(i, t) for i, t in zip(ids.tolist(), targets.tolist(), strict=True) if t != IGNORED}
            new = torch.cat([torch.tensor([True]), numbers[1:] != numbers[:-1]])
            assert (positions[new] == 0).all()
            assert (positions[1:][~new[1:]] == positions[:-1][~new[1:]] + 1).all()
            assert (ids[1:][~new[1:] & real[1:]] == ids[:-1][~new[1:] & real[1:]] + 1).all()
        assert batch.tokens == int((batch.ids >= 0).sum())
        assert batch.valid == int((batch.targets != IGNORED).sum())
    # A last piece that is only the end of its document has no target and is left out.
    left_out = {start + n - 1 for n, start in zip(lengths, starts, strict=True) if n % block_size == 1}
    assert sorted(seen) == sorted(set(range(sum(lengths))) - left_out)
    expected = {
        (i, i + 1) for n, start in zip(lengths, starts, strict=True) for i in range(start, start + n - 1)
    }
    assert pairs == expected


def test_best_fit_fills_rows() -> None:
    rows = assign_rows([5, 3, 8, 2, 6, 8], 8)
    assert sorted(sorted(row) for row in rows) == [[0, 1], [2], [3, 4], [5]]


def test_a_document_that_fits_a_row_is_not_cut() -> None:
    lengths = [30, 31, 5, 20, 12]
    assert [len(piece.ids) for piece in pieces_of([document(n) for n in lengths], 32)] == lengths


def test_without_packing_a_row_holds_one_piece_and_is_as_long_as_the_longest() -> None:
    rows = Rows([document(5), document(9), document(40)], 16, packing=False, pad_id=0)
    assert len(rows) == 5
    (batch, *_) = rows.batches(2, CPU)
    assert batch.ids.shape == (2, 9)
    assert batch.tokens == 14
    assert (batch.targets[0, 4:] == IGNORED).all()
    assert batch.document_ids[0].tolist() == [0] * 5 + [1] * 4


def test_epochs_are_permutations_and_repeat() -> None:
    rows = Rows([document(16, 16 * i) for i in range(7)], 16, packing=True, pad_id=0)
    epochs = []
    for epoch in range(2):
        batches = [rows.training_batch(4 * epoch + i, 2, 3, CPU).ids[:, 0] for i in range(4)]
        epochs.append(torch.cat(batches).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == [16 * i for i in range(7)]
    assert epochs[0] != epochs[1]
    again = rows.training_batch(5, 2, 3, CPU)
    assert torch.equal(again.ids, rows.training_batch(5, 2, 3, CPU).ids)


@pytest.mark.parametrize("limit", [1, 3, 7, 0])
def test_evaluation_rows_are_spread(limit: int) -> None:
    rows = Rows([document(16, 16 * i) for i in range(7)], 16, packing=True, pad_id=0)
    firsts = [int(i) for batch in rows.batches(2, CPU, limit) for i in batch.ids[:, 0]]
    assert len(firsts) == len(set(firsts)) == (limit or 7)

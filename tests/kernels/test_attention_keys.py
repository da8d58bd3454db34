"""Attention of queries that are the last of more tokens, as in decoding with a cache and chunked prefill.

Values and gradients of such shapes are in the grids of test_attention.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tapelm
from tapelm._library import CUDA_LAUNCHERS
from tapelm.attention import attention_reference

INF, NAN = float("inf"), float("nan")


def make(
    hq: int, hkv: int, t: int, s: int, d: int, dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    sizes = ((hq, t), (hkv, s), (hkv, s))
    return [torch.randn(2, heads, rows, d).to(dtype).to(device) for heads, rows in sizes]


@pytest.mark.parametrize("last", [1, 8, 17, 37])
@pytest.mark.parametrize("documents", [False, True])
def test_last_queries_are_those_of_the_whole(last: int, documents: bool, device: torch.device) -> None:
    q, k, v = make(4, 2, 69, 69, 24, torch.float32, device)
    ids = (torch.arange(69) // 30).int().expand(2, 69).to(device) if documents else None
    whole = torch.ops.tapelm.attention_forward(q, k, v, True, 0.2, 0.0, None, ids)
    ours = torch.ops.tapelm.attention_forward(q[:, :, -last:], k, v, True, 0.2, 0.0, None, ids)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b[:, :, -last:], rtol=1e-5, atol=1e-5)


def test_a_document_may_begin_in_the_last_rows_of_a_tile(device, check) -> None:
    """Tiles of 32 and 64 queries begin within the 16 tokens that Triton has one span of documents for."""
    q, k, v = make(2, 1, 70, 75, 16, torch.float32, device)
    ids = (torch.arange(75) >= 64).int().expand(2, 75).to(device)
    check(
        lambda q, k, v: tapelm.attention(q, k, v, document_ids=ids),
        lambda q, k, v: attention_reference(q, k, v, document_ids=ids),
        q, k, v,
    )  # fmt: skip


@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (9, 3), (8, 8)])
@pytest.mark.parametrize("t", [1, 3])
def test_decoding_is_the_same_for_every_number_of_threads(hq, hkv, t, dtype, set_threads) -> None:
    q, k, v = make(hq, hkv, t, 1500, 40, dtype, "cpu")

    def run(count: int) -> tuple[Tensor, ...]:
        set_threads(count)
        return torch.ops.tapelm.attention_forward(q, k, v, True, 0.2, 0.0, None, None)

    one = run(1)
    for count in (2, 3, 3):
        assert all(torch.equal(a, b) for a, b in zip(one, run(count), strict=True))


def test_decoding_reads_a_cache_of_any_strides(dtype, device) -> None:
    q, k, v = make(6, 2, 2, 300, 48, dtype, device)
    expected = tapelm.attention(q, k, v)
    room = torch.full((2, 500, 2, 48), NAN, dtype=dtype, device=device).transpose(1, 2)  # 300 are written
    room[:, :, :300] = k
    assert torch.equal(tapelm.attention(q.mT.contiguous().mT, room[:, :, :300], v), expected)


def test_decoding_propagates_what_is_not_finite(device) -> None:
    """A NaN key reaches the queries that see it; a query with scores of minus infinity has no weights."""
    q, k, v = (x.abs() + 0.1 for x in make(2, 1, 3, 700, 16, torch.float32, device))
    k[0, 0, 698] = NAN
    q[1, 1, 0] = -INF
    out = tapelm.attention(q, k, v)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 1], [0, 1, 2], [1, 1, 0]]
    assert tapelm.attention(q[1:, :1] * 1e4, k[1:] * 1e4, v[1:]).isfinite().all()


@pytest.mark.parametrize("t", [1, 3])
def test_decoding_does_not_read_documents_that_end_before(t: int, dtype: torch.dtype) -> None:
    """As rows that pad a batch on the left: whatever they hold, only the queries' own document counts."""
    q, k, v = make(4, 2, t, 700, 24, dtype, "cpu")
    own = [300, 521]  # where it begins in each row of the batch: in the second and third part of the keys
    ids = (torch.arange(700) >= torch.tensor(own)[:, None]).int()
    for row, first in enumerate(own):
        k[row, :, :first] = v[row, :, :first] = NAN
    out = tapelm.attention(q, k, v, document_ids=ids)
    for row, first in enumerate(own):
        alone = tapelm.attention(*(x[row : row + 1] for x in (q, k[:, :, first:], v[:, :, first:])))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out[row : row + 1], alone, rtol=tolerance, atol=tolerance)


def test_decoding_reads_values_no_further_than_four_queries_see() -> None:
    """A NaN among the values reaches the queries that see it, and of the others those computed with them."""
    q, k, v = make(1, 1, 8, 40, 16, torch.float32, "cpu")
    v[0, 0, 37] = NAN  # the sixth query's own
    out = tapelm.attention(q, k, v)
    assert out[0, 0, :4].isfinite().all() and out[0, 0, 5:].isnan().all()
    assert out[1].isfinite().all()


def test_one_key_is_the_result(device, dtype) -> None:
    q, k, v = make(2, 1, 5, 1, 16, dtype, device)
    # GPUs multiply float32 as two parts of 11 bits each, which are not all of its 24.
    slack = 2.0**-21 if device.type == "cuda" and dtype == torch.float32 else 0.0
    out = tapelm.attention(q, k, v, causal=False)
    torch.testing.assert_close(out, v.expand(2, 2, 5, 16), rtol=slack, atol=0.0)


def test_no_queries_leave_gradients_of_zero(device, dtype) -> None:
    q, k, v = (x.requires_grad_() for x in make(2, 1, 0, 6, 16, dtype, device))
    gradients = torch.autograd.grad(tapelm.attention(q, k, v).sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("t", "s", "ids", "causal", "told"),
    [
        (5, 4, None, True, "k has 4 rows and q 5|q has 5 rows and k 4"),
        (5, 4, 4, False, "k has 4 rows and q 5|q has 5 rows and k 4"),
        (3, 8, 3, True, "document_ids"),
        (3, 8, 3, False, "document_ids"),
        (3, 0, None, False, "k has no rows|and k none"),
    ],
)
def test_what_cannot_be_is_refused_at_every_level(t, s, ids, causal, told) -> None:
    q, k, v = make(2, 1, t, s, 16, torch.float32, "cpu")
    documents = None if ids is None else torch.zeros(2, ids, dtype=torch.int32)
    with pytest.raises(ValueError, match=told):
        tapelm.attention(q, k, v, causal=causal, document_ids=documents)
    for launch in (torch.ops.tapelm.attention_forward, CUDA_LAUNCHERS["attention_forward"]):
        with pytest.raises(ValueError, match=told):
            launch(q, k, v, causal, 0.2, 0.0, None, documents)
    for launch in (torch.ops.tapelm.attention_backward, CUDA_LAUNCHERS["attention_backward"]):
        with pytest.raises(ValueError, match=told):
            launch(q, q, k, v, q, q[..., 0], causal, 0.2, 0.0, None, documents)

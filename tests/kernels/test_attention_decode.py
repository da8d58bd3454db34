"""The Triton kernels of a few queries at the end of many keys: parts, traffic, dispatch.

Values and gradients of such shapes are in the grids of test_attention.py, what holds on every device in
test_attention_keys.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor

import tapelm
from tapelm import _attention_decode_kernels as decode_kernels
from tapelm import roofline
from tapelm._attention_configs import decode_config
from tapelm._attention_decode_kernels import MOST_PARTS, split
from tapelm._library import CUDA_LAUNCHERS
from tapelm.attention import attention_reference
from tapelm.proofs.traffic import Traffic, counted_traffic
from tapelm.testing import assert_close, interpreted_triton

BF16, FP32 = torch.bfloat16, torch.float32
forward = CUDA_LAUNCHERS["attention_forward"]
interprets = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are not interpreted where a GPU runs them"
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def interpreted() -> Iterator[None]:
    with interpreted_triton():
        yield


def make(hq: int, hkv: int, t: int, s: int, d: int, dtype: torch.dtype, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, h, rows, d).to(dtype) for h, rows in ((hq, t), (hkv, s), (hkv, s))]


def cut(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Makes parts of so many tiles."""
    monkeypatch.setattr(decode_kernels, "split", lambda groups, tiles, slots: (-(-tiles // length), length))


def blocks(q: Tensor, k: Tensor) -> dict[str, int]:
    return decode_config(q.device, q.itemsize, q.shape[3], q.shape[1] // k.shape[1] * q.shape[2])


@pytest.mark.parametrize("groups", [1, 3, 8, 64, 264, 300, 4000])
@pytest.mark.parametrize("slots", [4, 216, 264])
def test_parts_hold_all_tiles_and_fill_the_gpu(groups: int, slots: int) -> None:
    for tiles in (1, 2, 3, 31, 64, 129, 2048, 5001):
        parts, length = split(groups, tiles, slots)
        assert 1 <= parts <= MOST_PARTS and (parts - 1) * length < tiles <= parts * length
        rounds = -(-groups * parts // slots)
        assert rounds * (length + 1) <= -(-groups // slots) * (tiles + 1), "worse than no parts"
        if tiles >= 64 and groups * MOST_PARTS >= slots:
            assert groups * parts >= 0.7 * slots, "the GPU is not busy"


@interprets
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [100, 7, 1])
def test_any_number_of_parts_is_the_same_attention(
    length: int, documents: bool, dtype: torch.dtype, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 or 48 tiles: one part; several, the last one shorter; more than are merged at a time."""
    q, k, v = make(4, 2, 3, 760, 136, dtype)
    k[:, :, 700:] += 0.5 * q[:, ::2, :1]  # tops differ between parts
    ids = (torch.arange(760) // 300).int()[None] if documents else None
    cut(monkeypatch, length)
    out, lse = forward(q, k, v, True, 0.1, 0.0, None, ids)
    exact, theirs = (
        attention_reference(*(x.to(kind) for x in (q, k, v)), scale=0.1, document_ids=ids)
        for kind in (torch.float64, dtype)
    )
    assert_close("out", dtype, out, theirs, exact)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.1
    hidden = torch.ones(3, 760, dtype=torch.bool).triu(758)
    if ids is not None:
        hidden |= ids[0, -3:, None] != ids
    expected = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-5)


def counted(*arguments: object) -> Traffic:
    with interpreted_triton(), counted_traffic() as traffic:
        forward(*arguments)
    return traffic


@interprets
@pytest.mark.parametrize("length", [100, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [(9, 3, 1, 700, 64), (2, 2, 9, 600, 48), (8, 1, 2, 350, 128)], ids=lambda sizes: str(sizes)
)
def test_keys_and_values_are_read_once(
    sizes: tuple[int, ...], dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make(*sizes, dtype, batch=2)
    cut(monkeypatch, length)
    config = blocks(q, k)
    parts = -(-sizes[3] // (length * config["BLOCK_N"])) if length < 100 else 1
    traffic = counted(q, k, v, True, 0.2, 0.0, None, None)
    assert traffic.of("k_ptr").bytes == k.nbytes and traffic.of("v_ptr").bytes == v.nbytes
    expected = roofline.attention_decode_tiles(
        q, k, parts, config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"]
    )
    assert (traffic.bytes, traffic.flops) == (expected.bytes, expected.flops)


@interprets
def test_memory_traffic_is_the_minimum() -> None:
    """Within 5%, what is found of parts included."""
    q, k, v = make(8, 2, 1, 2000, 64, BF16, batch=2)
    arguments = (q, k, v, True, 0.2, 0.0, None, None)
    least = roofline.minimum("attention_forward", *arguments)
    assert 0.99 * least.bytes <= counted(*arguments).memory_bytes() <= 1.05 * least.bytes


@interprets
def test_tiles_of_other_documents_are_skipped() -> None:
    """At both ends of a part; what lies between, whatever its documents, is read."""
    q, k, v = make(2, 1, 1, 1024, 64, BF16)
    s, flops = torch.arange(1024), {}
    for name, ids in {"one": 0 * s, "half": s // 512, "quarter and last": (s >= 256) & (s < 1023)}.items():
        flops[name] = counted(q, k, v, True, 0.2, 0.0, None, ids.int()[None]).flops
    assert flops["half"] == flops["one"] / 2
    # Parts are two of eight tiles: the first whole, of the last its second.
    assert flops["quarter and last"] == flops["one"] * 3 / 8


@interprets
@pytest.mark.parametrize(
    ("sizes", "dropout_p", "decodes"),
    [
        ((4, 2, 1, 50, 16), 0.0, True),
        ((4, 2, 32, 50, 16), 0.0, True),  # 64 queries of a group
        ((4, 2, 33, 50, 16), 0.0, False),
        ((4, 2, 1, 50, 16), 0.5, False),
        ((4, 2, 8, 8, 16), 0.0, False),  # the first tokens
    ],
)
def test_few_queries_behind_keys_are_decoded(sizes: tuple[int, ...], dropout_p: float, decodes: bool) -> None:
    seed = torch.tensor(3) if dropout_p else None
    for dtype, most in ((BF16, 64), (FP32, 16)):
        q, k, v = make(*sizes, dtype)
        kernels = {kernel for kernel, _ in counted(q, k, v, True, 0.2, dropout_p, seed, None).flows}
        few = sizes[0] // sizes[1] * sizes[2] <= most
        assert ("attention_decode_kernel" in kernels) == (decodes and few), (dtype, kernels)
        assert ("attention_forward_kernel" in kernels) != (decodes and few)


@on_cuda
@pytest.mark.parametrize("documents", [False, True])
def test_decoding_repeats_in_a_graph_on_cuda(documents: bool, dtype: torch.dtype) -> None:
    """Nothing waits for the host: a captured graph gives the same bits, also of other numbers."""
    q, k, v = (x.cuda() for x in make(8, 2, 1, 3000, 64, dtype))
    ids = (torch.arange(3000, device="cuda") // 1100).int()[None] if documents else None
    eager = tapelm.attention(q, k, v, document_ids=ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tapelm.attention(q, k, v, document_ids=ids)
    for _ in range(2):
        graph.replay()
        assert torch.equal(captured, eager)
    q.normal_()
    graph.replay()
    assert torch.equal(captured, tapelm.attention(q, k, v, document_ids=ids))

"""Results of 8 MB and more are written past the caches: each element is that of a small result."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import tapelm  # noqa: F401  registers the ops
from tapelm._philox import keep_scale
from tests.kernels.machine_code import machine_code

ops = torch.ops.tapelm
ROWS = 4400
PARTS = [slice(first, first + 550) for first in range(0, ROWS, 550)]
Op = Callable[[slice], tuple[Tensor, ...]]


@cache
def drawn() -> Tensor:
    """Once: to draw them takes longer than the kernels do."""
    return torch.randn((ROWS + 3) * 2048, generator=torch.Generator().manual_seed(1234))


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return drawn()[: math.prod(shape)].view(shape).to(dtype)


def layer_norm(width: int, dtype: torch.dtype) -> Op:
    x, grad, weight = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(3))

    def op(rows: slice) -> tuple[Tensor, ...]:
        y, mean, rstd = ops.layer_norm_forward(x[rows], weight[0], weight[1], 1e-5)
        return y, mean, rstd, ops.layer_norm_backward(grad[rows], x[rows], weight[0], mean, rstd)[0]

    return op


def rms_norm(width: int, dtype: torch.dtype) -> Op:
    x, grad, weight = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(3))

    def op(rows: slice) -> tuple[Tensor, ...]:
        y, rstd = ops.rms_norm_forward(x[rows], weight[0], 1e-5)
        added = ops.add_norm_forward(x[rows], grad[rows], weight[0], None, 1e-5, 0.0, None)
        back = ops.add_norm_backward(grad[rows], None, added[1], weight[0], None, added[3], 0.0, None)
        dx = ops.rms_norm_backward(grad[rows], x[rows], weight[0], rstd)[0]
        return y, rstd, dx, added[0], added[1], back[0]

    return op


def add_norm(width: int, dtype: torch.dtype) -> Op:
    x, residual, grad, weight = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(4))

    def op(rows: slice) -> tuple[Tensor, ...]:
        y, r, mean, rstd = ops.add_norm_forward(
            x[rows], residual[rows], weight[0], weight[1], 1e-5, 0.0, None
        )
        back = ops.add_norm_backward(grad[rows], grad[rows], r, weight[0], mean, rstd, 0.0, None)
        return y, r, mean, rstd, back[0]

    return op


def bias_gelu(width: int, dtype: torch.dtype) -> Op:
    x, grad, bias = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(3))
    return lambda rows: (
        ops.bias_gelu_forward(x[rows], bias[0]),
        ops.bias_gelu_backward(grad[rows], x[rows], bias[0])[0],
    )


def swiglu(width: int, dtype: torch.dtype) -> Op:
    gate, up, grad = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(3))
    return lambda rows: (
        ops.swiglu_forward(gate[rows], up[rows]),
        *ops.swiglu_backward(grad[rows], gate[rows], up[rows]),
    )


def rope(width: int, dtype: torch.dtype) -> Op:
    q, k = (random(ROWS + n, 2, 4, width // 8 * 2, dtype=dtype)[n:] for n in range(2))
    cos, sin = (random(4, width // 8 * 2, dtype=torch.float32) for _ in range(2))
    return lambda rows: (
        *ops.rope(q[rows], k[rows], cos, sin, False),
        *ops.rope(q[rows], k[rows], cos, sin, True),
    )


def embedding(width: int, dtype: torch.dtype) -> Op:
    tokens, positions = random(700, width, dtype=dtype), random(1, width, dtype=dtype)
    ids = torch.arange(ROWS)[:, None] * 13 % 700
    return lambda rows: (ops.embedding_forward(ids[rows], tokens, positions, 0.0, None),)


@pytest.mark.parametrize("op", [layer_norm, rms_norm, add_norm, bias_gelu, swiglu, rope, embedding])
@pytest.mark.parametrize("width", [1024, 1001], ids=["lines", "no lines"])
def test_values_of_far_results_on_cpu(op, width, dtype):
    results = op(width, dtype)
    parts = [results(rows) for rows in PARTS]
    for index, far in enumerate(results(slice(0, ROWS))):
        assert torch.equal(far, torch.cat([part[index] for part in parts])), index


@pytest.mark.parametrize("width", [1024, 1001], ids=["lines", "no lines"])
def test_gradients_of_far_tables_on_cpu(width, dtype):
    """Of the table of tokens two rows have gradients, the others zeros."""
    grad = random(3, 1, width, dtype=dtype)
    tokens, positions = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(1, width, dtype=dtype)
    ids = torch.tensor([[7], [4399], [7]])
    far, _ = ops.embedding_backward(grad, ids, tokens, positions, 0.0, None)
    expected = torch.zeros_like(tokens)
    expected[4399] = grad[1, 0]
    expected[7] = (grad[0, 0].float() + grad[2, 0].float()).to(dtype)
    assert torch.equal(far, expected)


@pytest.mark.parametrize("size", [2**23 + 1000, 2**23 + 1001])
def test_values_of_far_dropout_on_cpu(size, dtype):
    """The mask of an element depends on its index alone: it is that of float32."""
    x, seed = random(size, dtype=dtype), torch.tensor([3])
    far, kept = ops.dropout(x, 0.3, seed), ops.dropout(torch.ones(size), 0.3, seed) != 0
    assert torch.equal(far[:40_001], ops.dropout(x[:40_001], 0.3, seed))
    assert torch.equal(far, torch.where(kept, x.float() * keep_scale(0.3), 0.0).to(dtype))


def test_values_of_far_norms_with_dropout_on_cpu(dtype):
    seed, width = torch.tensor([3]), 1024
    x, residual, grad = (random(ROWS + n, width, dtype=dtype)[n:] for n in range(3))
    weight, bias = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
    y, r, mean, rstd = ops.add_norm_forward(x, residual, weight, bias, 1e-5, 0.3, seed)
    dropped, lost = ops.dropout(x, 0.3, seed), ops.dropout(torch.ones_like(x), 0.3, seed) == 0
    plain = [
        ops.add_norm_forward(dropped[rows], residual[rows], weight, bias, 1e-5, 0.0, None) for rows in PARTS
    ]
    for found, index in ((y, 0), (r, 1)):
        expected = torch.cat([part[index] for part in plain])
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    dr, dx, *_ = ops.add_norm_backward(grad, None, r, weight, mean, rstd, 0.3, seed)
    without = ops.add_norm_backward(grad, None, r, weight, mean, rstd, 0.0, None)[0]
    assert torch.equal(dr, without) and torch.equal(dx == 0, lost | (dr == 0))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the code of x86")
def test_far_results_are_streamed() -> None:
    """Each kernel of each variant has the stores that pass the caches by."""
    kernels = (
        "norm_rows norm_backward_rows bias_gelu_rows bias_gelu_backward_rows swiglu_range "
        "swiglu_backward_range rope_positions embedding_rows embedding_sum dropout_range"
    )
    code = machine_code(rf"tapelm::(avx\w+)::({kernels.replace(' ', '|')})<")
    found = {(name[1], name[2]) for name, body in code if any("vmovnt" in text for _, text in body)}
    assert found == {(isa, kernel) for isa in ("avx2", "avx512", "avx512bf16") for kernel in kernels.split()}

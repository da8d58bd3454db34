"""Results of 8 MB and more are written past the caches: each element is that of a small result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tapelm  # noqa: F401  registers the ops

ops = torch.ops.tapelm
ROWS, FEW = 4200, slice(4097, 4200)
Op = Callable[[slice], tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


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
        return y, rstd, ops.rms_norm_backward(grad[rows], x[rows], weight[0], rstd)[0]

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
    return lambda rows: ops.rope(q[rows], k[rows], cos, sin, False)


def embedding(width: int, dtype: torch.dtype) -> Op:
    tokens, positions = random(700, width, dtype=dtype), random(1, width, dtype=dtype)
    ids = torch.arange(ROWS)[:, None] * 13 % 700
    return lambda rows: (ops.embedding_forward(ids[rows], tokens, positions, 0.0, None),)


@pytest.mark.parametrize("op", [layer_norm, rms_norm, add_norm, bias_gelu, swiglu, rope, embedding])
@pytest.mark.parametrize("width", [1024, 1001], ids=["lines", "no lines"])
def test_values_of_far_results_on_cpu(op, width, dtype):
    small = op(width, dtype)
    for far, near in zip(small(slice(0, ROWS)), small(FEW), strict=True):
        assert torch.equal(far[FEW], near)


@pytest.mark.parametrize("width", [1024, 1001], ids=["lines", "no lines"])
def test_gradients_of_far_tables_on_cpu(width, dtype):
    """Of the table of tokens two rows have gradients, the others zeros."""
    grad = random(3, 1, width, dtype=dtype)
    tokens, positions = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(1, width, dtype=dtype)
    ids = torch.tensor([[7], [4199], [7]])
    far, _ = ops.embedding_backward(grad, ids, tokens, positions, 0.0, None)
    expected = torch.zeros_like(tokens)
    expected[4199] = grad[1, 0]
    expected[7] = (grad[0, 0].float() + grad[2, 0].float()).to(dtype)
    assert torch.equal(far, expected)


@pytest.mark.parametrize("size", [2**22 + 1000, 2**22 + 1001])
def test_values_of_far_dropout_on_cpu(size, dtype):
    """The mask of an element depends on its index alone: the beginning of a tensor is a smaller one."""
    x, seed = random(size, dtype=dtype), torch.tensor([3])
    few = 40_001
    assert torch.equal(ops.dropout(x, 0.3, seed)[:few], ops.dropout(x[:few], 0.3, seed))
    weight, bias = torch.ones(2**10, dtype=dtype), torch.zeros(2**10, dtype=dtype)
    wide = x[: 2**22].view(-1, 2**10)
    y, r, mean, rstd = ops.add_norm_forward(wide, wide, weight, bias, 1e-5, 0.3, seed)
    dr, dx, *_ = ops.add_norm_backward(wide, None, r, weight, mean, rstd, 0.3, seed)
    near = ops.add_norm_forward(wide[:50], wide[:50], weight, bias, 1e-5, 0.3, seed)
    assert torch.equal(y[:50], near[0])
    near_dr, near_dx, *_ = ops.add_norm_backward(
        wide[:50], None, near[1], weight, near[2], near[3], 0.3, seed
    )
    assert torch.equal(dr[:50], near_dr) and torch.equal(dx[:50], near_dx)

"""Linear layer.

    y = x @ weight.T + bias    dx = grad @ weight    dweight = grad.T @ x      dbias = sum over rows of grad

Shapes: x, dx (..., K); y, grad (..., N); weight, dweight (N, K); bias, dbias (N,), all of one dtype. The CPU
kernel is ours; CUDA uses torch's matrix products, which are cuBLAS.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._library import autocast, check_tensors, register_cuda, register_fake


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    y = x @ weight.T
    return y if bias is None else y + bias


@register_cuda("linear_forward")
def launch_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``tapelm::linear_forward`` on CUDA."""
    return torch.nn.functional.linear(x, weight, bias).contiguous()


@register_cuda("linear_backward")
def launch_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``tapelm::linear_backward`` on CUDA."""
    grad, x = grad.contiguous(), x.contiguous()
    rows = grad.view(-1, weight.shape[0]) if grad.numel() else grad.new_zeros(0, weight.shape[0])
    inputs = x.view(-1, weight.shape[1]) if x.numel() else x.new_zeros(rows.shape[0], weight.shape[1])
    dx = (grad @ weight).contiguous()
    dbias = rows.sum(0, dtype=torch.float32).to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx, rows.T @ inputs[: rows.shape[0]], dbias


@register_fake("linear_forward")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_fake("linear_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0] if has_bias else 0),
    )


@register_flop_formula(torch.ops.tapelm.linear_forward)
def _(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.tapelm.linear_backward)
def _(
    grad_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 4 * math.prod(x_shape[:-1]) * math.prod(weight_shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: (..., K); float32 or bfloat16, on CUDA also float16.
        weight: (N, K), dtype of x.
        bias: (N,) or None, dtype of x. Under autocast all three are cast to its dtype.

    Returns:
        (..., N), contiguous, dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: shapes that do not match, or devices that differ.
    """
    x, weight, bias = autocast(x, weight, bias)
    check_tensors("linear", bias, x=x, weight=weight)
    shape = weight.shape
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"linear: weight is {tuple(weight.shape)}; x {tuple(x.shape)} needs (N, K), K its last size."
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(
            f"linear: bias is {tuple(bias.shape)}; weight {tuple(weight.shape)} needs one per row."
        )
    return torch.ops.tapelm.linear_forward(x, weight, bias)

"""Layer normalisation over the last dimension.

    rstd = (var + eps)**-0.5        h = (x - mean) * rstd        y = h * weight + bias
    dx = rstd * (g - mean(g) - h * mean(g * h))               g = grad * weight
    dweight = sum over rows of grad * h                       dbias = sum over rows of grad

[Ba, Kiros and Hinton, "Layer normalization", 2016]

Shapes: x, y, grad, dx (..., N); weight, bias, dweight, dbias (N,), all of one dtype; mean, rstd (...)
float32. Statistics and sums over rows are in float32. The Triton kernels are in _norm_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import (
    autocast_is_on,
    cast,
    check_tensors,
    register_cuda,
    register_fake,
)
from ._norm_launches import launch_backward, launch_forward


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@register_cuda("layer_norm_forward", x="*S N", weight="N", bias="N")
def launch_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::layer_norm_forward``."""
    y, _, mean, rstd = launch_forward(x, weight, bias, eps)
    assert mean is not None
    return y, mean, rstd


@register_cuda("layer_norm_backward", grad="*S N", x="*S N", weight="N", mean="*S", rstd="*S")
def launch_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::layer_norm_backward``."""
    dx, _, dweight, dbias = launch_backward(grad, x, weight, mean, rstd)
    assert dbias is not None
    return dx, dweight, dbias


@register_fake("layer_norm_forward")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@register_fake("layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises each row of the last dimension to mean 0 and variance 1, then scales and shifts it.

    Args:
        x: (..., N); float32 or bfloat16, on CUDA also float16.
        weight, bias: (N,), dtype of x; under autocast they are cast to it.
        eps: added to the variance; > 0.

    Returns:
        (..., N), contiguous, dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, eps <= 0, or devices differ.
    """
    if autocast_is_on(x):
        weight, bias = cast(x.dtype, weight, bias)
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError("layer_norm: x has no dimension to normalise; give it at least one.")
    shape = x.shape[-1:]
    if weight.shape != shape or bias.shape != shape:
        name, tensor = ("bias", bias) if weight.shape == shape else ("weight", weight)
        raise ValueError(
            f"layer_norm: {name} is {tuple(tensor.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)."
        )
    if not eps > 0:
        raise ValueError(f"layer_norm: eps is {eps}; it must be positive.")
    return torch.ops.tapelm.layer_norm_forward.default(x, weight, bias, eps)[0]

"""Root-mean-square normalisation over the last dimension.

    rstd = (mean(x**2) + eps)**-0.5        h = x * rstd        y = h * weight
    dx = rstd * (g - h * mean(g * h))      g = grad * weight   dweight = sum over rows of grad * h

[Zhang and Sennrich, "Root mean square layer normalization", 2019]

Shapes: x, y, grad, dx (..., N); weight, dweight (N,), all of one dtype; rstd (...) float32. Statistics and
sums over rows are in float32. The Triton kernels are in _norm_kernels.py.
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


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


@register_cuda("rms_norm_forward", x="*S N", weight="N")
def launch_rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::rms_norm_forward``."""
    y, _, _, rstd = launch_forward(x, weight, None, eps)
    return y, rstd


@register_cuda("rms_norm_backward", grad="*S N", x="*S N", weight="N", rstd="*S")
def launch_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::rms_norm_backward``."""
    dx, _, dweight, _ = launch_backward(grad, x, weight, None, rstd)
    return dx, dweight


@register_fake("rms_norm_forward")
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@register_fake("rms_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Divides each row of the last dimension by its root mean square, then scales it.

    Args:
        x: (..., N); float32 or bfloat16, on CUDA also float16.
        weight: (N,), dtype of x; under autocast it is cast to it.
        eps: added to the mean square; > 0.

    Returns:
        (..., N), contiguous, dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, eps <= 0, or devices differ.
    """
    if autocast_is_on(x):
        (weight,) = cast(x.dtype, weight)
    check_tensors("rms_norm", x=x, weight=weight)
    if x.dim() == 0:
        raise ValueError("rms_norm: x has no dimension to normalise; give it at least one.")
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight is {tuple(weight.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)."
        )
    if not eps > 0:
        raise ValueError(f"rms_norm: eps is {eps}; it must be positive.")
    return torch.ops.tapelm.rms_norm_forward.default(x, weight, eps)[0]

"""The end of one residual branch and the start of the next: dropout, addition and norm in one pass.

    r = residual + dropout(x)              y = norm(r) * weight (+ bias)
    dresidual = grad_r + the norm's dx     dx = dropout(dresidual) with the same mask

norm is LayerNorm with a bias and RMSNorm without, as in layer_norm.py and rms_norm.py; the mask is that of
dropout.py: element i of the contiguous x has index i in the random stream of the seed. It is computed again
in backward; stored are r, which is an output anyway, and the statistics.

Shapes: x, residual, r, y and their gradients (..., N); weight, bias (N,); all of one dtype; mean, rstd (...)
float32; seed (), int64. y is the norm of r as rounded to its dtype. The Triton kernels are in
_norm_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import (
    autocast_is_on,
    cast,
    check_probability,
    check_tensors,
    draw_seed,
    register_cuda,
    register_fake,
)
from ._norm_launches import launch_backward, launch_forward
from .dropout import dropout_reference
from .layer_norm import layer_norm_reference
from .rms_norm import rms_norm_reference


def add_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, any dtype; ``bias`` None is RMSNorm."""
    r = residual + dropout_reference(x, dropout_p, seed)
    if bias is None:
        return rms_norm_reference(r, weight, eps), r
    return layer_norm_reference(r, weight, bias, eps), r


@register_cuda("add_norm_forward", x="*S N", residual="*S N", weight="N", bias="N", seed="")
def launch_add_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Triton launch of ``tapelm::add_norm_forward``."""
    y, r, mean, rstd = launch_forward(x, weight, bias, eps, residual, seed if dropout_p else None, dropout_p)
    assert r is not None
    return y, r, rstd.new_empty(0) if mean is None else mean, rstd


@register_cuda(
    "add_norm_backward", grad="*S N", grad_r="*S N", r="*S N", weight="N", mean="*S", rstd="*S", seed=""
)
def launch_add_norm_backward(
    grad: Tensor, grad_r: Tensor | None, r: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Triton launch of ``tapelm::add_norm_backward``."""
    dresidual, dx, dweight, dbias = launch_backward(
        grad, r, weight, mean, rstd, grad_r, seed if dropout_p else None, dropout_p
    )
    return (
        dresidual,
        r.new_empty(0) if dx is None else dx,
        dweight,
        weight.new_empty(0) if dbias is None else dbias,
    )


@register_fake("add_norm_forward")
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
    eps: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = rstd.new_empty(0) if bias is None else torch.empty_like(rstd)
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@register_fake("add_norm_backward")
def _(
    grad: Tensor, grad_r: Tensor | None, r: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dbias = (
        r.new_empty(r.shape if dropout_p else 0),
        weight.new_empty(0 if mean is None else weight.shape),
    )
    return r.new_empty(r.shape), dx, weight.new_empty(weight.shape), dbias


def _add_norm(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    if autocast_is_on(residual):
        x, weight, bias = cast(residual.dtype, x, weight, bias)
    check_tensors(op, bias, x=x, residual=residual, weight=weight)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimension to normalise; give it at least one.")
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual is {tuple(residual.shape)}; it needs the shape of x, {tuple(x.shape)}."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} is {tuple(tensor.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)."
            )
    if not eps > 0:
        raise ValueError(f"{op}: eps is {eps}; it must be positive.")
    check_probability(op, "dropout_p", dropout_p)
    seed = draw_seed(x.device) if dropout_p else None
    return torch.ops.tapelm.add_norm_forward.default(x, residual, weight, bias, eps, dropout_p, seed)[:2]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """r = residual + dropout(x), and the LayerNorm of r over its last dimension.

    Args:
        x, residual: (..., N); float32 or bfloat16, on CUDA also float16.
        weight, bias: (N,). Under autocast x, weight and bias are cast to the dtype of ``residual``.
        eps: added to the variance; > 0.
        dropout_p: probability in [0, 1) that an element of x is dropped, rounded as that of ``dropout``; the
            mask follows ``torch.manual_seed`` and is not stored.

    Returns:
        (LayerNorm(r), r), both (..., N), contiguous, dtype of residual.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, eps <= 0, dropout_p outside [0, 1), or devices differ.
    """
    if bias is None:
        raise TypeError(
            "add_layer_norm: bias is None; pass zeros, or use add_rms_norm, which does not centre."
        )
    return _add_norm("add_layer_norm", x, residual, weight, bias, eps, dropout_p)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """r = residual + dropout(x), and the RMSNorm of r; as ``add_layer_norm`` without centring and bias."""
    return _add_norm("add_rms_norm", x, residual, weight, None, eps, dropout_p)

"""Bias and GELU (tanh form) in one pass.

    z = x + bias          y = z * sigmoid(2 u)          u = sqrt(2 / pi) * (z + 0.044715 z**3)
    dx = grad * (s + z * s * (1 - s) * 2 u')            s = sigmoid(2 u)       dbias = sum of dx over the rows

which is the tanh form because tanh(u) = 2 sigmoid(2 u) - 1 [Hendrycks and Gimpel, 2016].

Shapes: x, y, grad, dx (..., N); bias, dbias (N,); all of one dtype. Arithmetic and sums are in float32.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import (
    autocast,
    check_tensors,
    processors,
    register_cuda,
    register_fake,
)
from ._tuning import choose


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    return torch.nn.functional.gelu(x + bias, approximate="tanh")


# Beyond 20 gelu is 0 or z: cut off there, +-inf does not become inf * 0. NaN stays.
CUT: tl.constexpr = tl.constexpr(20.0)


@triton.jit
def _twice_u(z):
    return z * (z * z * 0.07135481627260025 + 1.5957691216057308)


@triton.jit
def bias_gelu_forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = row[:, None] * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    z = tl.maximum(z, -CUT, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + at, (z * tl.sigmoid(_twice_u(z))).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    # A program owns BLOCK_C columns and every num_programs(1)-th block of rows: dbias needs no atomics.
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(tl.program_id(1) * BLOCK_R, rows, tl.num_programs(1) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * cols + col[None, :]
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        z = tl.clamp(z, -CUT, CUT, propagate_nan=tl.PropagateNan.ALL)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(_twice_u(z))
        twice_du = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        dx = grad * (s + z * s * (1.0 - s) * twice_du)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        total += dx
    tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * cols + col, tl.sum(total, axis=0), mask=col < cols)


# 1024 columns give each thread eight elements of bias, one 128-bit load in half precision.
TILE = {"BLOCK_R": 2, "BLOCK_C": 1024, "num_warps": 4}


@register_cuda("bias_gelu_forward", x="*S N", bias="N")
def launch_bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """Triton launch of ``tapelm::bias_gelu_forward``."""
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        cols = x.shape[-1]
        rows = x.numel() // cols
        tile = choose("bias_gelu_forward", x.device, (x.itemsize,), TILE)
        grid = (triton.cdiv(rows, tile["BLOCK_R"]), triton.cdiv(cols, tile["BLOCK_C"]))
        bias_gelu_forward_kernel[grid](x, bias, y, rows, cols, **tile)
    return y


@register_cuda("bias_gelu_backward", grad="*S N", x="*S N", bias="N")
def launch_bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::bias_gelu_backward``."""
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(bias)
    cols = x.shape[-1]
    rows = x.numel() // cols
    tile = choose("bias_gelu_backward", x.device, (x.itemsize,), TILE)
    col_blocks = triton.cdiv(cols, tile["BLOCK_C"])
    row_programs = min(triton.cdiv(rows, tile["BLOCK_R"]), max(1, 8 * processors(x.device) // col_blocks))
    partial = torch.empty(row_programs, cols, dtype=torch.float32, device=x.device)
    bias_gelu_backward_kernel[(col_blocks, row_programs)](grad, x, bias, dx, partial, rows, cols, **tile)
    return dx, partial.sum(0).to(bias.dtype)


@register_fake("bias_gelu_forward")
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("bias_gelu_backward")
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh form) of ``x + bias``.

    Args:
        x: (..., N); float32 or bfloat16, on CUDA also float16.
        bias: (N,), dtype of x. Under autocast both are cast to its dtype.

    Returns:
        (..., N), contiguous, dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: bias is not (N,), or devices differ.
    """
    x, bias = autocast(x, bias)
    check_tensors("bias_gelu", x=x, bias=bias)
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: bias is {tuple(bias.shape)}; x {tuple(x.shape)} needs bias of its last dimension."
        )
    return torch.ops.tapelm.bias_gelu_forward.default(x, bias)

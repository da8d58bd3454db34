"""Layer normalisation over the last dimension.

    rstd = (var + eps)**-0.5        h = (x - mean) * rstd        y = h * weight + bias
    dx = rstd * (g - mean(g) - h * mean(g * h))               g = grad * weight
    dweight = sum over rows of grad * h                       dbias = sum over rows of grad

[Ba, Kiros and Hinton, "Layer normalization", 2016]

Shapes: x, y, grad, dx (..., N); weight, bias, dweight, dbias (N,), all of one dtype; mean, rstd (...)
float32. Statistics and sums over rows are in float32.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import (
    check_tensors,
    forbid_second_derivative,
    processors,
    register_autograd,
    register_cuda,
    register_fake,
)

# Widest row the Triton kernels hold in registers without spilling.
MAX_CUDA_WIDTH = 8192


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@triton.jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    cols,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    at = row[:, None].to(tl.int64) * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / cols
    centred = tl.where(col[None, :] < cols, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / cols + eps)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def layer_norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, cols,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Each program takes every num_programs-th block of rows and keeps one partial dweight and dbias: no
    # atomics.
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * cols + col[None, :]
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        g = grad * weight[None, :]
        dx = g - (tl.sum(g, axis=1) / cols)[:, None] - h * (tl.sum(g * h, axis=1) / cols)[:, None]
        tl.store(dx_ptr + at, (dx * rstd[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += grad * h
        dbias += grad
    at = program * cols + col
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=col < cols)
    tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=col < cols)


def launch_config(cols: int) -> dict[str, int]:
    """Tile of BLOCK_R whole rows and the warps that hold it: 16 elements per thread."""
    if cols > MAX_CUDA_WIDTH:
        raise ValueError(
            f"layer_norm: x has rows of {cols} elements; the CUDA kernel supports {MAX_CUDA_WIDTH}."
        )
    block = max(32, triton.next_power_of_2(cols))
    rows = max(1, 2048 // block)
    return {"BLOCK_R": rows, "BLOCK_C": block, "num_warps": max(4, rows * block // 512)}


@register_cuda("layer_norm_forward")
def launch_layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::layer_norm_forward``."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel():
        config = launch_config(x.shape[-1])
        grid = (triton.cdiv(mean.numel(), config["BLOCK_R"]),)
        layer_norm_forward_kernel[grid](
            x, weight, bias, y, mean, rstd, mean.numel(), x.shape[-1], eps, **config
        )
    return y, mean, rstd


@register_cuda("layer_norm_backward")
def launch_layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::layer_norm_backward``."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    config = launch_config(x.shape[-1])
    programs = min(triton.cdiv(mean.numel(), config["BLOCK_R"]), 4 * processors(x.device))
    partial = torch.empty(2, programs, x.shape[-1], dtype=torch.float32, device=x.device)
    layer_norm_backward_kernel[(programs,)](
        grad, x, weight, mean.contiguous(), rstd.contiguous(), dx, partial[0], partial[1],
        mean.numel(), x.shape[-1], **config,
    )  # fmt: skip
    dweight, dbias = partial.sum(1).to(weight.dtype).unbind()
    return dx, dweight.clone(), dbias.clone()


@register_fake("layer_norm_forward")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@register_fake("layer_norm_backward")
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.tapelm.layer_norm_backward(grad, *ctx.saved_tensors), None


register_autograd("layer_norm_forward", _setup, _backward)
forbid_second_derivative("layer_norm_backward")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalises each row of the last dimension to mean 0 and variance 1, then scales and shifts it.

    Args:
        x: (..., N); float32 or bfloat16, on CUDA also float16 and N <= 8192.
        weight, bias: (N,), dtype of x; under autocast they are cast to it.
        eps: added to the variance; > 0.

    Returns:
        (..., N), contiguous, dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, eps <= 0, or devices differ.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError("layer_norm: x has no dimension to normalise; give it at least one.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name} is {tuple(tensor.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)."
            )
    if not eps > 0:
        raise ValueError(f"layer_norm: eps is {eps}; it must be positive.")
    return torch.ops.tapelm.layer_norm_forward(x, weight, bias, eps)[0]

"""Dropout whose mask is computed, never stored, and is the same on every device.

    y[i] = x[i] / (1 - q)  if r(seed, i) >= q * 2**16  else 0      i: index in the contiguous tensor
    q = round(p * 2**16) / 2**16, at most 1 - 2**-16

r(seed, i) are the 16-bit random numbers of _philox.py. The scale is that of q, so that the mean of y is x for
every p. Backward is the same function with the same seed applied to the gradient.

Shapes: x and y (...), float32 / bfloat16 (float16 on CUDA); seed (), int64.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import (
    check_probability,
    check_tensors,
    draw_seed,
    register_cuda,
    register_fake,
)
from ._philox import keep_mask, keep_reference, keep_scale, keep_threshold
from ._tuning import choose


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return torch.where(keep_reference(index, p, seed), x * keep_scale(p), 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["threshold"])
def dropout_kernel(x_ptr, seed_ptr, y_ptr, numel, threshold, scale, BLOCK: tl.constexpr):
    seed = tl.load(seed_ptr)
    block = tl.program_id(0).to(tl.int64)
    kept = keep_mask(seed, block * (BLOCK // 8) + tl.arange(0, BLOCK // 8), threshold)
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, tl.where(kept, x * scale, 0.0).to(y_ptr.dtype.element_ty), mask=index < numel)


TILE = {"BLOCK": 2048, "num_warps": 4}  # elements of a program


@register_cuda("dropout", seed="")
def launch_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Triton launch of ``tapelm::dropout``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        tile = choose("dropout", x.device, (x.itemsize,), TILE)
        grid = (triton.cdiv(x.numel(), tile["BLOCK"]),)
        dropout_kernel[grid](x, seed, y, x.numel(), keep_threshold(p), keep_scale(p), **tile)
    return y


@register_fake("dropout")
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element with probability ``p`` and scales the others so that the mean stays.

    Args:
        x: any shape; float32 or bfloat16, on CUDA also float16.
        p: probability in [0, 1), rounded to a multiple of 2**-16 below 1; 0 returns ``x`` itself.

    Returns:
        A contiguous tensor of x's shape and dtype. The mask follows ``torch.manual_seed`` and is not stored.

    Raises:
        TypeError: unsupported dtype.
        ValueError: p outside [0, 1), or an unsupported device.
    """
    check_tensors("dropout", x=x)
    check_probability("dropout", "p", p)
    return torch.ops.tapelm.dropout.default(x, p, draw_seed(x.device)) if p else x

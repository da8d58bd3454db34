"""Launches of the norms' Triton kernels: outputs, grids and tiles."""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._library import configured_architecture, next_power_of_2, processors
from ._norm_kernels import (
    norm_backward_kernel,
    norm_forward_kernel,
    norm_weights_kernel,
    wide_norm_backward_kernel,
    wide_norm_forward_kernel,
)
from ._philox import keep_scale, keep_threshold
from ._tuning import Config, choose

NARROW_WIDTH = 8192  # widest row a program holds in registers without spilling
WARPS = 64  # of resident programs that walk over the rows, per multiprocessor
WIDE = {"BLOCK_C": 4096, "num_warps": 8}
WEIGHTS = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}


def forward_config(cols: int, architecture: str) -> Config:
    """Tile of BLOCK_R whole rows and its warps. Up to 1024 columns one warp has whole rows to itself, so
    that statistics need neither shared memory nor barriers; from there 8 or 16 elements per thread."""
    block = max(32, next_power_of_2(cols))
    if block <= 1024:
        # On sm_100 a row of 1024 with its weight and bias spills 8 bytes a thread of a single warp.
        warps = 2 if block == 1024 and architecture == "sm_100" else 1
        return {"BLOCK_R": min(8, 1024 // block), "num_warps": warps}
    return {"BLOCK_R": 1, "num_warps": max(8, block // 512)}


def backward_config(cols: int) -> Config:
    """Tile of BLOCK_R whole rows and its warps: 16 elements per thread, few programs for few partial sums."""
    block = max(32, next_power_of_2(cols))
    rows = max(1, 2048 // block)
    return {"BLOCK_R": rows, "num_warps": max(4, rows * block // 512)}


def _block(cols: int) -> int:
    return max(32, next_power_of_2(cols))


def _variant(x: Tensor, *parts: Tensor | None) -> tuple[int | bool, ...]:
    """What a configuration depends on beside the width: bytes per element and which parts there are."""
    return (x.itemsize, *(part is not None for part in parts))


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    residual: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """(y, residual + dropout(x), mean, rstd); without residual the second, without bias the third is None."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = None if bias is None else torch.empty_like(rstd)
    if x.numel():
        cols, rows = x.shape[-1], rstd.numel()
        tensors = (x, residual, seed, weight, bias, y, total, mean, rstd)
        dropout = (keep_threshold(dropout_p), keep_scale(dropout_p))
        aligned = cols % 8 == 0
        variant = _variant(x, residual, seed, bias)
        if cols > NARROW_WIDTH:
            config = choose("wide_norm_forward", x.device, variant, WIDE)
            wide_norm_forward_kernel[(rows,)](*tensors, cols, eps, *dropout, ALIGNED=aligned, **config)
        else:
            shipped = forward_config(cols, configured_architecture(x.device))
            config = choose("norm_forward", x.device, (_block(cols), *variant), shipped)
            persistent = _block(cols) <= 1024  # wider, weight and bias would cost occupancy
            programs = triton.cdiv(rows, config["BLOCK_R"])
            if persistent:
                programs = min(programs, WARPS * processors(x.device) // config["num_warps"])
            norm_forward_kernel[(programs,)](
                *tensors, rows, cols, eps, *dropout,
                ALIGNED=aligned, PERSISTENT=persistent, BLOCK_C=_block(cols), **config,
            )  # fmt: skip
    return y, total, mean, rstd


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor,
    grad_sum: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """(dx + grad_sum, dropout of it, dweight, dbias); without seed or mean, the second or last is None."""
    grad, x, weight, rstd = (t.contiguous() for t in (grad, x, weight, rstd))
    mean, grad_sum = (None if t is None else t.contiguous() for t in (mean, grad_sum))
    dx = torch.empty_like(x)
    dropped = None if seed is None else torch.empty_like(x)
    cols, rows = x.shape[-1], rstd.numel()
    narrow, variant = cols <= NARROW_WIDTH, _variant(x, grad_sum, seed, mean)
    if narrow:
        config = choose("norm_backward", x.device, (_block(cols), *variant), backward_config(cols))
        column_blocks = 1
    else:
        config = choose("norm_weights", x.device, variant[::3], WEIGHTS)
        column_blocks = triton.cdiv(cols, config["BLOCK_C"])
    row_blocks = triton.cdiv(rows, config["BLOCK_R"])
    programs = max(1, min(row_blocks, 4 * processors(x.device) // column_blocks))
    partial = x.new_empty(1 if mean is None else 2, programs, cols, dtype=torch.float32)
    dweight, dbias = partial[0], None if mean is None else partial[1]
    tensors = (grad, grad_sum, x, seed, weight, mean, rstd, dx, dropped)
    dropout = (keep_threshold(dropout_p), keep_scale(dropout_p))
    aligned = cols % 8 == 0
    if not x.numel():
        partial.zero_()
    elif narrow:
        norm_backward_kernel[(programs,)](
            *tensors, dweight, dbias, rows, cols, *dropout, ALIGNED=aligned, BLOCK_C=_block(cols), **config
        )
    else:
        wide = choose("wide_norm_backward", x.device, variant, WIDE)
        wide_norm_backward_kernel[(rows,)](*tensors, cols, *dropout, ALIGNED=aligned, **wide)
        norm_weights_kernel[(column_blocks, programs)](
            grad, x, mean, rstd, dweight, dbias, rows, cols, **config
        )
    sums = [part.sum(0).to(weight.dtype) for part in partial]
    return dx, dropped, sums[0], None if mean is None else sums[1]

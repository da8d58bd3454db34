"""Triton kernels of the norms and their launches; layer_norm.py, rms_norm.py and add_norm.py have the maths.

One pair of kernels serves all: a pointer that is None compiles its part away. Without ``bias`` (backward:
``mean``) the norm is RMSNorm; without ``residual`` nothing is added; without ``seed`` nothing is dropped.
Rows up to NARROW_WIDTH stay in registers, so that each tensor crosses memory once. Wider rows are walked
in blocks, twice, with the second reading from the cache; their weight gradients take a third kernel.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import processors
from .dropout import keep_elements, keep_mask, keep_scale, keep_threshold

NARROW_WIDTH = 8192  # widest row a program holds in registers without spilling
WIDE = {"BLOCK_C": 4096, "num_warps": 8}
WEIGHTS = {"BLOCK_R": 8, "BLOCK_C": 256, "num_warps": 4}


@triton.jit
def _drop(x, seed_ptr, row, first, cols, threshold, scale, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr):
    """x (R, BLOCK_C), columns from ``first`` (a multiple of four) of rows ``row``, after dropout."""
    seed = tl.load(seed_ptr)
    if ALIGNED:
        groups = row.to(tl.int64) * (cols // 4) + first // 4
        kept = keep_mask(seed, groups[:, None] + tl.arange(0, BLOCK_C // 4)[None, :], threshold)
    else:
        index = row.to(tl.int64) * cols + first
        kept = keep_elements(seed, index[:, None] + tl.arange(0, BLOCK_C)[None, :], threshold)
    return tl.where(kept, x * scale, 0.0)


@triton.jit
def _sum_with_residual(
    x, residual_ptr, seed_ptr, sum_ptr, at, inside, row, first, cols, threshold, scale,
    BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores residual + dropout(x) and returns it as it was rounded."""
    if seed_ptr is not None:
        x = _drop(x, seed_ptr, row, first, cols, threshold, scale, BLOCK_C, ALIGNED)
    total = (tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32) + x).to(
        sum_ptr.dtype.element_ty
    )
    tl.store(sum_ptr + at, total, mask=inside)
    return tl.where(inside, total.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["threshold"])
def norm_forward_kernel(
    x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, cols, eps, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_C)
    at = row[:, None].to(tl.int64) * cols + col[None, :]
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x = _sum_with_residual(
            x, residual_ptr, seed_ptr, sum_ptr, at, inside, row, 0, cols, threshold, scale, BLOCK_C, ALIGNED
        )
    if bias_ptr is not None:
        mean = tl.sum(x, axis=1) / cols
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(col[None, :] < cols, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / cols + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd[:, None] * tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def norm_backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, seed_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dropped_ptr,
    dweight_ptr, dbias_ptr, rows, cols, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # A program takes every num_programs-th block of rows and keeps one partial dweight and dbias: no atomics.
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(program * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * cols + col[None, :]
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            h = tl.where(inside, h - tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None], 0.0)
        h *= rstd[:, None]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = grad * weight[None, :]
        dx = g - h * (tl.sum(g * h, axis=1) / cols)[:, None]
        if mean_ptr is not None:
            dx -= (tl.sum(g, axis=1) / cols)[:, None]
            dbias += grad
        dweight += grad * h
        dx *= rstd[:, None]
        if grad_sum_ptr is not None:
            dx += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if seed_ptr is not None:
            dx = _drop(dx, seed_ptr, row, 0, cols, threshold, scale, BLOCK_C, ALIGNED)
            tl.store(dropped_ptr + at, dx.to(dropped_ptr.dtype.element_ty), mask=inside)
    at = program * cols + col
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=col < cols)
    if mean_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["threshold"])
def wide_norm_forward_kernel(
    x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    cols, eps, threshold, scale, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # One row per program. Mean and sum of squared deviations of the blocks are merged as in Chan et al. 1979.
    row = tl.program_id(0) + tl.arange(0, 1)
    mean, squares = 0.0, 0.0
    for start in range(0, cols, BLOCK_C):
        col = (start + tl.arange(0, BLOCK_C))[None, :]
        at, inside = row[:, None].to(tl.int64) * cols + col, col < cols
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x = _sum_with_residual(
                x, residual_ptr, seed_ptr, sum_ptr, at, inside, row, start, cols, threshold, scale,
                BLOCK_C, ALIGNED,
            )  # fmt: skip
        if bias_ptr is not None:
            count = tl.minimum(cols - start, BLOCK_C).to(tl.float32)
            delta = tl.sum(x) / count - mean
            x = tl.where(inside, x - (mean + delta), 0.0)
            share = count / (start + count)
            squares += delta * delta * start * share
            mean += delta * share
        squares += tl.sum(x * x)
    rstd = tl.rsqrt(squares / cols + eps)
    tl.store(rstd_ptr + row, rstd)
    if bias_ptr is not None:
        tl.store(mean_ptr + row, mean)
    if residual_ptr is not None:
        tl.debug_barrier()  # the sum is read back below, by other threads where the layout differs
        x_ptr = sum_ptr
    for start in range(0, cols, BLOCK_C):
        col = (start + tl.arange(0, BLOCK_C))[None, :]
        at, inside = row[:, None].to(tl.int64) * cols + col, col < cols
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def wide_norm_backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, seed_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dropped_ptr,
    cols, threshold, scale, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + tl.program_id(0))
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + tl.program_id(0))
    sum_g, sum_gh = 0.0, 0.0
    for start in range(0, cols, BLOCK_C):
        col = (start + tl.arange(0, BLOCK_C))[None, :]
        at = row[:, None].to(tl.int64) * cols + col
        # Columns beyond the row have g = 0, so that h counts for nothing there.
        h = (tl.load(x_ptr + at, mask=col < cols, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(grad_ptr + at, mask=col < cols, other=0.0).to(tl.float32)
        g *= tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
        sum_gh += tl.sum(g * h)
        if mean_ptr is not None:
            sum_g += tl.sum(g)
    for start in range(0, cols, BLOCK_C):
        col = (start + tl.arange(0, BLOCK_C))[None, :]
        at, inside = row[:, None].to(tl.int64) * cols + col, col < cols
        h = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
        dx = (g - sum_g / cols - h * (sum_gh / cols)) * rstd
        if grad_sum_ptr is not None:
            dx += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if seed_ptr is not None:
            dx = _drop(dx, seed_ptr, row, start, cols, threshold, scale, BLOCK_C, ALIGNED)
            tl.store(dropped_ptr + at, dx.to(dropped_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_weights_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, rows, cols,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A program owns BLOCK_C columns and every num_programs(1)-th block of rows.
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_R, rows, tl.num_programs(1) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * cols + col[None, :]
        inside = (row[:, None] < rows) & (col[None, :] < cols)
        h = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            h -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            dbias += grad
        dweight += grad * h * tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    at = tl.program_id(1) * cols + col
    tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=col < cols)
    if mean_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=col < cols)


def forward_config(cols: int) -> dict[str, int]:
    """Tile of BLOCK_R whole rows and its warps. Up to 1024 columns one warp has whole rows to itself, so
    that statistics need neither shared memory nor barriers; from there 8 or 16 elements per thread."""
    block = max(32, triton.next_power_of_2(cols))
    if block <= 1024:
        return {"BLOCK_R": min(8, 1024 // block), "BLOCK_C": block, "num_warps": 1}
    return {"BLOCK_R": 1, "BLOCK_C": block, "num_warps": max(8, block // 512)}


def backward_config(cols: int) -> dict[str, int]:
    """Tile of BLOCK_R whole rows and its warps: 16 elements per thread, few programs for few partial sums."""
    block = max(32, triton.next_power_of_2(cols))
    rows = max(1, 2048 // block)
    return {"BLOCK_R": rows, "BLOCK_C": block, "num_warps": max(4, rows * block // 512)}


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
        aligned = cols % 4 == 0
        if cols > NARROW_WIDTH:
            wide_norm_forward_kernel[(rows,)](*tensors, cols, eps, *dropout, ALIGNED=aligned, **WIDE)
        else:
            config = forward_config(cols)
            grid = (triton.cdiv(rows, config["BLOCK_R"]),)
            norm_forward_kernel[grid](*tensors, rows, cols, eps, *dropout, ALIGNED=aligned, **config)
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
    narrow, config = cols <= NARROW_WIDTH, backward_config(cols)
    column_blocks = 1 if narrow else triton.cdiv(cols, WEIGHTS["BLOCK_C"])
    row_blocks = triton.cdiv(rows, config["BLOCK_R"] if narrow else WEIGHTS["BLOCK_R"])
    programs = max(1, min(row_blocks, 4 * processors(x.device) // column_blocks))
    partial = x.new_empty(1 if mean is None else 2, programs, cols, dtype=torch.float32)
    dweight, dbias = partial[0], None if mean is None else partial[1]
    tensors = (grad, grad_sum, x, seed, weight, mean, rstd, dx, dropped)
    dropout = (keep_threshold(dropout_p), keep_scale(dropout_p))
    aligned = cols % 4 == 0
    if not x.numel():
        partial.zero_()
    elif narrow:
        norm_backward_kernel[(programs,)](
            *tensors, dweight, dbias, rows, cols, *dropout, ALIGNED=aligned, **config
        )
    else:
        wide_norm_backward_kernel[(rows,)](*tensors, cols, *dropout, ALIGNED=aligned, **WIDE)
        norm_weights_kernel[(column_blocks, programs)](
            grad, x, mean, rstd, dweight, dbias, rows, cols, **WEIGHTS
        )
    sums = [part.sum(0).to(weight.dtype) for part in partial]
    return dx, dropped, sums[0], None if mean is None else sums[1]

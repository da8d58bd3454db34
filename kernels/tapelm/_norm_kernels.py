"""Triton kernels of the norms; layer_norm.py, rms_norm.py and add_norm.py have the maths.

Their grids and tiles are in _norm_launches.py.

One pair of kernels serves all: a pointer that is None compiles its part away. Without ``bias`` (backward:
``mean``) the norm is RMSNorm; without ``residual`` nothing is added; without ``seed`` nothing is dropped.
Rows up to NARROW_WIDTH stay in registers, so that each tensor crosses memory once. Wider rows are walked
in blocks, twice, with the second reading from the cache; their weight gradients take a third kernel.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import drop


@triton.jit
def _sum_with_residual(
    x, residual_ptr, seed_ptr, sum_ptr, at, inside, row, first, cols, threshold, scale,
    BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores residual + dropout(x) and returns it as it was rounded."""
    if seed_ptr is not None:
        x = drop(x, seed_ptr, row, first, cols, threshold, scale, BLOCK_C, ALIGNED)
    total = (tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32) + x).to(
        sum_ptr.dtype.element_ty
    )
    tl.store(sum_ptr + at, total, mask=inside)
    return tl.where(inside, total.to(tl.float32), 0.0)


@triton.jit
def _vector(ptr, col, cols):
    return tl.load(ptr + col, mask=col < cols, other=0.0).to(tl.float32)


@triton.jit
def _norm_rows(
    row, weight, bias, x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr,
    rstd_ptr, rows, cols, eps, threshold, scale, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Rows ``row``; weight and bias are loaded where they are None."""
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
    y = x * rstd[:, None] * (_vector(weight_ptr, col, cols) if weight is None else weight)[None, :]
    if bias_ptr is not None:
        y += (_vector(bias_ptr, col, cols) if bias is None else bias)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def norm_forward_kernel(
    x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    rows, cols, eps, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    # A persistent program takes every num_programs-th block of rows and keeps weight and bias.
    first = tl.program_id(0) * BLOCK_R
    if PERSISTENT:
        col = tl.arange(0, BLOCK_C)
        weight = _vector(weight_ptr, col, cols)
        bias = None if bias_ptr is None else _vector(bias_ptr, col, cols)
        for start in range(first, rows, tl.num_programs(0) * BLOCK_R):
            _norm_rows(
                start + tl.arange(0, BLOCK_R), weight, bias,
                x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
                rows, cols, eps, threshold, scale, BLOCK_C, ALIGNED,
            )  # fmt: skip
    else:
        _norm_rows(
            first + tl.arange(0, BLOCK_R), None, None,
            x_ptr, residual_ptr, seed_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
            rows, cols, eps, threshold, scale, BLOCK_C, ALIGNED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def norm_backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, seed_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dropped_ptr,
    dweight_ptr, dbias_ptr, rows, cols, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # A program takes every num_programs-th block of rows and keeps one partial dweight and dbias: no atomics.
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    # Loaded for each row of the tile: every thread gets the 16 bytes that it needs, some from L1.
    col2 = tl.broadcast_to(col[None, :], [BLOCK_R, BLOCK_C])
    weight = tl.load(weight_ptr + col2, mask=col2 < cols, other=0.0).to(tl.float32)
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
        g = grad * weight
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
            dx = drop(dx, seed_ptr, row, 0, cols, threshold, scale, BLOCK_C, ALIGNED)
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
            dx = drop(dx, seed_ptr, row, start, cols, threshold, scale, BLOCK_C, ALIGNED)
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

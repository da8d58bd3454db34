"""Token and position embedding with dropout in one pass.

    y[..., t, :] = dropout(tokens[ids[..., t]] + positions[t])
    dtokens[v] = sum of dropout(grad) over the rows with id v
    dpositions[t] = sum of dropout(grad) over the rows at position t; zero for positions that ids do not reach

The mask is that of dropout.py: element i of the contiguous y has index i in the random stream of the seed. It
is computed again in backward. Sums are in float32 and run over the rows in their order: no atomics, so that a
rerun gives the same bits.

Shapes: ids (..., T), int64 or int32; tokens (V, C); positions (P, C), P >= T; y, grad (..., T, C); seed (),
int64. Backward takes tokens and positions for their shapes alone.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import (
    check_is_tensor,
    check_probability,
    check_tensors,
    draw_seed,
    next_power_of_2,
    register_cuda,
    register_fake,
)
from ._philox import drop, keep_scale, keep_threshold
from .dropout import dropout_reference


def embedding_reference(
    ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    y = torch.nn.functional.embedding(ids, tokens) + positions[: ids.shape[-1]]
    return y if seed is None else dropout_reference(y, dropout_p, seed)


@triton.jit(do_not_specialize=["threshold"])
def embedding_forward_kernel(
    ids_ptr, tokens_ptr, positions_ptr, seed_ptr, y_ptr, rows, time, cols, vocabulary, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    token = tl.load(ids_ptr + row, mask=row < rows, other=0).to(tl.int64)
    # An id outside the table has no row: NaN, as a GPU cannot raise.
    known = (token >= 0) & (token < vocabulary)
    at = token[:, None] * cols + col[None, :]
    x = tl.load(tokens_ptr + at, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
    at = (row % time).to(tl.int64)[:, None] * cols + col[None, :]
    x += tl.load(positions_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        x = drop(x, seed_ptr, row, first, cols, threshold, scale, BLOCK_C, ALIGNED)
    at = row.to(tl.int64)[:, None] * cols + col[None, :]
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def embedding_backward_kernel(
    grad_ptr, keys_ptr, order_ptr, seed_ptr, out_ptr, rows, cols, table_rows, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # keys are sorted; the program at the first row of a key sums all rows of it, in blocks.
    start = tl.program_id(0)
    key = tl.load(keys_ptr + start).to(tl.int64)
    before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    col = first + tl.arange(0, BLOCK_C)
    if (key != before) & (key >= 0) & (key < table_rows):
        total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
        count = BLOCK_R
        while count == BLOCK_R:
            at = start + tl.arange(0, BLOCK_R)
            same = (at < rows) & (tl.load(keys_ptr + at, mask=at < rows, other=-1).to(tl.int64) == key)
            row = tl.load(order_ptr + at, mask=same, other=0)
            inside = same[:, None] & (col[None, :] < cols)
            grad = tl.load(grad_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
            if seed_ptr is not None:
                grad = drop(grad, seed_ptr, row, first, cols, threshold, scale, BLOCK_C, ALIGNED)
            total += grad
            count = tl.sum(same.to(tl.int32))
            start += BLOCK_R
        tl.store(
            out_ptr + key * cols + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col < cols
        )


def _check_positions(ids: Tensor, positions: Tensor) -> None:
    if ids.shape[-1] > positions.shape[0]:
        raise ValueError(
            f"embedding: positions has {positions.shape[0]} rows; ids {tuple(ids.shape)} needs "
            f"{ids.shape[-1]}."
        )


def launch_config(cols: int) -> dict[str, int]:
    """Tile of rows and columns: 16 elements per thread."""
    block = min(1024, max(32, next_power_of_2(cols)))
    return {"BLOCK_R": 2048 // block, "BLOCK_C": block, "num_warps": 4}


@register_cuda("embedding_forward", ids="*S T", tokens="V C", positions="P C", seed="")
def launch_embedding_forward(
    ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Triton launch of ``tapelm::embedding_forward``."""
    _check_positions(ids, positions)
    ids, tokens, positions = ids.contiguous(), tokens.contiguous(), positions.contiguous()
    cols = tokens.shape[1]
    y = tokens.new_empty(*ids.shape, cols)
    if y.numel():
        config = launch_config(cols)
        grid = (triton.cdiv(ids.numel(), config["BLOCK_R"]), triton.cdiv(cols, config["BLOCK_C"]))
        embedding_forward_kernel[grid](
            ids, tokens, positions, seed if dropout_p else None, y, ids.numel(), ids.shape[-1], cols,
            tokens.shape[0], keep_threshold(dropout_p), keep_scale(dropout_p),
            ALIGNED=cols % 8 == 0, **config,
        )  # fmt: skip
    return y


@register_cuda("embedding_backward", grad="*S T C", ids="*S T", tokens="V C", positions="P C", seed="")
def launch_embedding_backward(
    grad: Tensor, ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::embedding_backward``."""
    _check_positions(ids, positions)
    grad, cols = grad.contiguous(), tokens.shape[1]
    place = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    outputs = []
    for table, keys in ((tokens, ids), (positions, place)):
        out = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
        if grad.numel():
            keys, order = torch.sort(keys.reshape(-1), stable=True)
            config = launch_config(cols)
            embedding_backward_kernel[keys.numel(), triton.cdiv(cols, config["BLOCK_C"])](
                grad, keys, order, seed if dropout_p else None, out, keys.numel(), cols, table.shape[0],
                keep_threshold(dropout_p), keep_scale(dropout_p), ALIGNED=cols % 8 == 0, **config,
            )  # fmt: skip
        outputs.append(out)
    return outputs[0], outputs[1]


@register_fake("embedding_forward")
def _(ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    return tokens.new_empty(*ids.shape, tokens.shape[1])


@register_fake("embedding_backward")
def _(
    grad: Tensor, ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), positions.new_empty(positions.shape)


def embedding(ids: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Rows of ``tokens`` by id plus the first rows of ``positions``, then dropout.

    Args:
        ids: (..., T), int64 or int32, each in [0, V).
        tokens: (V, C); float32 or bfloat16, on CUDA also float16.
        positions: (P, C) with P >= T, dtype of tokens; row t is added at place t. Pass ``positions[start:]``
            to go on from position ``start``.
        dropout_p: probability in [0, 1) that an element is dropped; the mask follows ``torch.manual_seed``
            and is not stored.

    Returns:
        (..., T, C), contiguous, dtype of tokens.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, dropout_p outside [0, 1), devices that differ or, on the CPU, an id outside
            [0, V), which on a GPU gives a row of NaN.
    """
    check_tensors("embedding", tokens=tokens, positions=positions)
    check_is_tensor("embedding", "ids", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: ids is {ids.dtype}; use int64 or int32.")
    if ids.device != tokens.device:
        raise ValueError(f"embedding: ids is on {ids.device} but tokens is on {tokens.device}.")
    if ids.dim() == 0:
        raise ValueError("embedding: ids has no dimension; give it (..., T).")
    if tokens.dim() != 2 or positions.dim() != 2 or tokens.shape[1] != positions.shape[1]:
        raise ValueError(
            f"embedding: tokens is {tuple(tokens.shape)} and positions {tuple(positions.shape)}; both must "
            "be matrices of one width."
        )
    _check_positions(ids, positions)
    check_probability("embedding", "dropout_p", dropout_p)
    seed = draw_seed(tokens.device) if dropout_p else None
    return torch.ops.tapelm.embedding_forward.default(ids, tokens, positions, dropout_p, seed)

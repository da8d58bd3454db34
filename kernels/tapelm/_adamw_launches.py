"""Launches of AdamW's Triton kernels: tensors cut into chunks whose addresses go to the device as a table."""

# Triton's stubs do not know its own language and launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ._adamw_kernels import adamw8_kernel, adamw_kernel, grad_norm_kernel
from ._adamw_states import QUANT_BLOCK
from ._library import register_cuda, register_fake

CHUNK = 65536  # elements per program
BLOCK = 1024
BLOCK_8_BITS = 2048
ALIGNMENT = 16  # bytes that the kernels' widest loads take at once


def _aligned(grad: Tensor) -> Tensor:
    """``grad``, contiguous and at an address that the kernels can load from: DDP and FSDP pack gradients of
    any size one behind the other."""
    grad = grad.contiguous()
    return grad.clone() if grad.data_ptr() % ALIGNMENT else grad


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _chunk_table(columns: Sequence[Sequence[Tensor]], first_words: Sequence[int] | None = None) -> Tensor:
    """(rows, chunks) int64 on the tensors' device: chunk addresses per column, first random word if given,
    length. A column with fewer elements than the first has one for each QUANT_BLOCK of them."""
    sizes = np.array([tensor.numel() for tensor in columns[0]], dtype=np.int64)
    counts = -(-sizes // CHUNK)
    owner = np.repeat(np.arange(len(sizes)), counts)
    offset = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)) * CHUNK
    rows = []
    for tensors in columns:
        addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        if (addresses % ALIGNMENT)[sizes > 0].any():
            raise ValueError(
                "adamw: a parameter does not start on a 16-byte boundary; clone() it into its own storage."
            )
        elements = np.array([tensor.nbytes for tensor in tensors], dtype=np.int64) / tensors[0].itemsize
        per_block = not np.array_equal(elements, sizes)
        if per_block and not np.array_equal(elements, -(-sizes // QUANT_BLOCK)):
            raise ValueError("adamw: gradients and states must be as large as their parameters.")
        step = tensors[0].itemsize / (QUANT_BLOCK if per_block else 1)
        rows.append(addresses[owner] + (offset * step).astype(np.int64))
    if first_words is not None:
        rows.append(np.array(first_words, dtype=np.int64)[owner] + offset)
    rows.append(np.minimum(sizes[owner] - offset, CHUNK))
    device = columns[0][0].device
    host = torch.from_numpy(np.stack(rows))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@register_cuda("grad_norm")
def launch_grad_norm(grads: list[Tensor]) -> Tensor:
    """Triton launch of ``tapelm::grad_norm``, one per dtype among the gradients."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(_aligned(grad))
    partials = []
    for dtype, tensors in by_dtype.items():
        table = _chunk_table([tensors])
        chunks = table.shape[1]
        partials.append(torch.empty(chunks, dtype=torch.float32, device=tensors[0].device))
        if chunks:
            grad_norm_kernel[(chunks,)](
                table, partials[-1], chunks, DTYPE=_TRITON_DTYPES[dtype], BLOCK=BLOCK, num_warps=4
            )
    return torch.cat(partials).sum().sqrt()


@register_cuda("adamw_step_")
def launch_adamw_step_(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    masters: list[Tensor], exp_avg_scale: list[Tensor], exp_avg_sq_scale: list[Tensor], first_word: list[int],
    grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
    key: int,
) -> None:  # fmt: skip
    """Triton launch of ``tapelm::adamw_step_``: all params of one dtype, all grads of one, either all moments
    8-bit or none; parameters that are not float32 and have no masters are rounded stochastically."""
    grads = [_aligned(grad) for grad in grads]
    columns = [params, grads, exp_avg, exp_avg_sq, masters or params]
    columns += [exp_avg_scale, exp_avg_sq_scale] if exp_avg_scale else []
    moment = torch.uint8 if exp_avg_scale else torch.float32
    wanted = [params[0].dtype, grads[0].dtype, moment, moment, torch.float32 if masters else params[0].dtype]
    if [column[0].dtype for column in columns] != wanted + [torch.float32] * (len(columns) - len(wanted)):
        raise TypeError(f"adamw: moments must be {moment}, masters and scales torch.float32.")
    table = _chunk_table(columns, first_word or [0] * len(params))
    if chunks := table.shape[1]:
        kernel, block = (adamw8_kernel, BLOCK_8_BITS) if exp_avg_scale else (adamw_kernel, BLOCK)
        dtype = params[0].dtype
        kernel[(chunks,)](
            table, grad_scale, chunks, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay,
            lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), key,
            DTYPE=_TRITON_DTYPES[dtype], GRAD_DTYPE=_TRITON_DTYPES[grads[0].dtype], HAS_MASTER=bool(masters),
            STOCHASTIC=dtype != torch.float32 and not masters, BLOCK=block, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


@register_fake("grad_norm")
def _(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@register_fake("adamw_step_")
def _(params: list[Tensor], *args: Any) -> None:
    return None

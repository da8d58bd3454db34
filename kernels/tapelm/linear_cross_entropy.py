"""Linear layer and cross-entropy in one op that never stores the (N, V) logits whole.

    logits = hidden @ weight.T + bias                  lse_n = log sum_v exp(logits_nv)
    loss = mean over valid n of lse_n - logits_n,target(n)          valid: target(n) != ignore_index
    dlogits = (softmax(logits) - onehot(target)) / number of valid rows, 0 on ignored rows
    dhidden = dlogits @ weight      dweight = dlogits.T @ hidden      dbias = sum over rows of dlogits

The forward pass goes over chunks of rows and turns the logits of a chunk into dlogits in place, so the
gradients for an upstream gradient of 1 exist when it ends; backward multiplies them by the upstream scalar.
On CUDA the division by the number of valid rows follows the products, which are summed in float32 over all
chunks: a probability of 1 / (V * N) is nothing in float16. Nothing is read back to the host.
With no valid row the loss is NaN, as in torch. [Idea: Hsu et al., "Liger kernel", 2024; Wijmans et al., "Cut
your losses", 2024]

Shapes: hidden (N, C), weight (V, C), bias (V,), all of one dtype; targets (N,) int64; loss () float32.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._library import (
    autocast,
    check_is_tensor,
    check_tensors,
    register_cuda,
    register_fake,
)
from ._tuning import choose

# Logits held at once on CUDA, in elements.
CHUNK_ELEMENTS = 1 << 26


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index
    )


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    valid_ptr,
    vocabulary,
    ignore_index,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss / number of valid rows, and its logits replaced by dlogits * number of valid rows."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    share = 1.0 / tl.load(valid_ptr).to(tl.float32)
    logits_ptr += row * vocabulary
    in_vocabulary = (target >= 0) & (target < vocabulary)
    chosen = tl.load(logits_ptr + target, mask=in_vocabulary, other=0.0).to(tl.float32)
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(largest, x)
        # Each lane keeps its own running maximum; lanes that saw no finite logit yet stay at zero.
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = highest
    top = tl.max(largest, axis=0)
    # A target outside the vocabulary makes loss and gradients NaN rather than reading foreign memory.
    lse = tl.where(in_vocabulary, top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0)), float("nan"))
    ignored = target == ignore_index
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, (lse - chosen) * share))
    if NEED_GRAD:
        for first in range(0, vocabulary, BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            dlogits = tl.where(ignored, 0.0, tl.exp(x - lse) - tl.where(at == target, 1.0, 0.0))
            tl.store(logits_ptr + at, dlogits.to(logits_ptr.dtype.element_ty), mask=at < vocabulary)


TILE = {"BLOCK": 2048, "num_warps": 4}  # logits of a row at a time


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total (float32) += a @ b, of half-precision factors too, which CPUs (the interpreter's) must widen."""
    if a.device.type == "cpu":
        return total.addmm_(a.float(), b.float())
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@register_cuda("linear_cross_entropy_forward", hidden="M C", weight="V C", targets="M", bias="V")
def launch_linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::linear_cross_entropy_forward``."""
    return _launch(hidden, weight, targets, bias, ignore_index, need_grad, need_grad)


@register_cuda("frozen_cross_entropy_forward", hidden="M C", weight="V C", targets="M")
def launch_frozen_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::frozen_cross_entropy_forward``, for a weight that does not train."""
    return _launch(hidden, weight, targets, None, ignore_index, need_grad, False)[:2]


def _launch(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, need_grad: bool,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, dhidden, dweight, dbias); gradients that are not needed are empty."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    chunk = min(max(rows, 1), max(128, CHUNK_ELEMENTS // max(vocabulary, 1) // 128 * 128))
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    valid = (targets != ignore_index).sum()
    share = 1.0 / valid.clamp(min=1)
    dhidden = torch.empty_like(hidden) if need_grad else hidden.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight_grad else weight.new_empty(0)
    dbias = (
        weight.new_zeros(vocabulary, dtype=torch.float32)
        if need_grad and bias is not None
        else weight.new_empty(0)
    )
    tile = choose("cross_entropy", hidden.device, (hidden.itemsize, need_grad), TILE)
    for first in range(0, rows, chunk):
        part = slice(first, first + chunk)
        logits = torch.nn.functional.linear(hidden[part], weight, bias)
        cross_entropy_kernel[(logits.shape[0],)](
            logits, targets[part], losses[part], valid, vocabulary, ignore_index,
            NEED_GRAD=need_grad, **tile,
        )  # fmt: skip
        if need_grad:
            zero = hidden.new_zeros(hidden[part].shape, dtype=torch.float32)
            dhidden[part] = _add_product(zero, logits, weight).mul_(share)
            if need_weight_grad:
                _add_product(dweight, logits.T, hidden[part])
            if bias is not None:
                dbias += logits.sum(0, dtype=torch.float32)
    # Dividing makes 0 / 0 = NaN when no row is valid.
    loss = losses.sum() + 0.0 * (valid / valid)
    return loss, dhidden, dweight.mul_(share).to(weight.dtype), dbias.mul_(share).to(weight.dtype)


@register_fake("linear_cross_entropy_forward")
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_grad else 0),
        weight.new_empty(weight.shape if need_grad else 0),
        weight.new_empty(weight.shape[0] if need_grad and bias is not None else 0),
    )


@register_fake("frozen_cross_entropy_forward")
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty((), dtype=torch.float32), hidden.new_empty(hidden.shape if need_grad else 0)


@register_flop_formula(torch.ops.tapelm.frozen_cross_entropy_forward)
def _(
    hidden_shape: Any, weight_shape: Any, targets_shape: Any, ignore_index: int, need_grad: bool,
    *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return (4 if need_grad else 2) * hidden_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.tapelm.linear_cross_entropy_forward)
def _(
    hidden_shape: Any, weight_shape: Any, targets_shape: Any, bias_shape: Any, ignore_index: int,
    need_grad: bool, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    return (6 if need_grad else 2) * hidden_shape[0] * weight_shape[0] * weight_shape[1]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T + bias`` against those ``targets`` that are not ignored.

    Args:
        hidden: (..., C); float32 or bfloat16, on CUDA also float16.
        weight: (V, C), dtype of hidden.
        targets: (...), int64, each in [0, V) or ``ignore_index``. Of another one the loss is NaN on CUDA, as
            are the gradients of its row of hidden, of weight and of bias: raising would wait for the GPU.
        bias: (V,) or None, dtype of hidden. Under autocast hidden, weight and bias are cast to its dtype.
        ignore_index: targets of this value count neither in the sum nor in the mean.

    Returns:
        0-d float32 loss in nats; NaN when every target is ignored.

    Raises:
        TypeError: unsupported or differing dtypes, targets that are not int64.
        ValueError: shapes that do not match, or devices that differ.
        IndexError: on CPUs, a target outside the vocabulary.
    """
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_tensors("linear_cross_entropy", bias, hidden=hidden, weight=weight)
    check_is_tensor("linear_cross_entropy", "targets", targets)
    if targets.dtype != torch.int64:
        raise TypeError(f"linear_cross_entropy: targets are {targets.dtype}; pass targets.long().")
    if targets.device != hidden.device:
        raise ValueError(
            f"linear_cross_entropy: targets are on {targets.device} but hidden is on {hidden.device}."
        )
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: weight is {tuple(weight.shape)}; "
            f"hidden {tuple(hidden.shape)} needs (V, {hidden.shape[-1] if hidden.dim() else 1})."
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets are {tuple(targets.shape)}; "
            f"hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias is {tuple(bias.shape)}; it must be ({weight.shape[0]},)."
        )
    need_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    hidden = hidden.reshape(targets.numel(), hidden.shape[-1])
    if bias is None and not weight.requires_grad:
        # Skips the gradient of the weight, which is a third of the work.
        return torch.ops.tapelm.frozen_cross_entropy_forward(
            hidden, weight, targets.reshape(-1), ignore_index, need_grad
        )[0]
    loss, *_ = torch.ops.tapelm.linear_cross_entropy_forward(
        hidden, weight, targets.reshape(-1), bias, ignore_index, need_grad
    )
    return loss

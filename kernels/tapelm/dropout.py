"""Dropout whose mask is computed, never stored, and is the same on every device.

    y[i] = x[i] / (1 - q)  if r(seed, i) >= q * 2**16  else 0      i: index in the contiguous tensor
    q = round(p * 2**16) / 2**16, at most 1 - 2**-16

r(seed, i) has 16 bits, as the generator would cost more than the rest of the op: half i & 1, the lower half
first, of word i >> 1 & 3 of Philox4x32-7 with key (low, high 32 bits of seed) and counter (low, high 32 bits
of i >> 3, 0, 0) [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: seven rounds pass
BigCrush]. The scale is that of q, so that the mean of y is x for every p. Backward is the same function with
the same seed applied to the gradient.

Shapes: x and y (...), float32 / bfloat16 (float16 on CUDA); seed (), int64.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import numpy as np
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
from ._tuning import choose

_WORD = 0xFFFFFFFF
ROUNDS: tl.constexpr = tl.constexpr(7)


def philox_reference(index: Tensor, seed: Tensor) -> Tensor:
    """Word index & 3 of counter index >> 2 for int64 indices, any shape, as int64 in [0, 2**32)."""
    group, lane = index >> 2, index & 3
    counter = [group & _WORD, (group >> 32) & _WORD, torch.zeros_like(group), torch.zeros_like(group)]
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS.value):
        # int64 products wrap, which leaves the 64 bits of the unsigned product.
        even, odd = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((odd >> 32) & _WORD) ^ counter[1] ^ key[0],
            odd & _WORD,
            ((even >> 32) & _WORD) ^ counter[3] ^ key[1],
            even & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return torch.stack(counter).gather(0, lane[None])[0]


def keep_threshold(p: float) -> int:
    """q * 2**16: random numbers below it are dropped."""
    return min(65535, round(p * 65536))


def keep_scale(p: float) -> float:
    """1 / (1 - q) in float32."""
    return float(np.float32(65536 / (65536 - keep_threshold(p))))


def keep_reference(index: Tensor, p: float, seed: Tensor) -> Tensor:
    """Whether the elements of int64 indices, any shape, stay."""
    return (philox_reference(index >> 1, seed) >> 16 * (index & 1)) & 0xFFFF >= keep_threshold(p)


def dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return torch.where(keep_reference(index, p, seed), x * keep_scale(p), 0.0).to(x.dtype)


@triton.jit
def random_words(seed, counters):
    """counters (..., G) int64 -> (..., 4 G) uint32, the Philox words in their order."""
    word0, word1, word2, word3 = tl.randint4x(seed, counters, n_rounds=ROUNDS)
    words = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def keep_mask(seed, groups, threshold):
    """groups (..., G) int64 indices of eight elements each -> (..., 8 G) bool, the elements that stay."""
    words, threshold = random_words(seed, groups), threshold.to(tl.uint32)
    return tl.interleave((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)


@triton.jit
def keep_elements(seed, index, threshold):
    """``keep_mask`` of any int64 indices, at eight times the work."""
    word0, word1, word2, word3 = tl.randint4x(seed, index >> 3, n_rounds=ROUNDS)
    lane = (index >> 1) & 3
    word = tl.where(lane < 2, tl.where(lane == 0, word0, word1), tl.where(lane == 2, word2, word3))
    word = word.to(tl.uint32, bitcast=True)
    return tl.where((index & 1) == 0, word & 0xFFFF, word >> 16) >= threshold.to(tl.uint32)


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

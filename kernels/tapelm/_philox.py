"""Random numbers computed from a seed and an index, the same on every device, and the masks made of them.

    r(seed, i) = half i & 1, the lower half first, of word i >> 1 & 3 of Philox4x32-7
                 with key (low, high 32 bits of seed) and counter (low, high 32 bits of i >> 3, 0, 0)

[Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: seven rounds pass BigCrush]. Dropout
takes 16 bits for an element, because generating more would cost more than the rest of the op; AdamW takes
whole words.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def drop(x, seed_ptr, row, first, cols, threshold, scale, BLOCK_C: tl.constexpr, ALIGNED: tl.constexpr):
    """x (R, BLOCK_C), columns from ``first`` (a multiple of eight) of rows ``row``, after dropout."""
    seed = tl.load(seed_ptr)
    if ALIGNED:
        groups = row.to(tl.int64) * (cols // 8) + first // 8
        kept = keep_mask(seed, groups[:, None] + tl.arange(0, BLOCK_C // 8)[None, :], threshold)
    else:
        index = row.to(tl.int64) * cols + first
        kept = keep_elements(seed, index[:, None] + tl.arange(0, BLOCK_C)[None, :], threshold)
    return tl.where(kept, x * scale, 0.0)

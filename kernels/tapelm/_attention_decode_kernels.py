"""Triton kernels and launch of ``attention`` for a few queries at the end of many keys, as in decoding.

Each program takes one part of the keys of one key head, for all queries of its group, and finds of each query

    top_p = max_s A_s       total_p = sum_s exp(A_s - top_p)       sums_p = sum_s exp(A_s - top_p) v_s

over the keys s of part p; a second kernel merges the parts in their order, with top = max_p top_p:

    total = sum_p exp(top_p - top) total_p                   lse = top + log total
    out = sum_p exp(top_p - top) sums_p / total

[Dao et al., "Flash-Decoding for long-context inference", 2023]. Keys and values are read once, by as many
programs as fill the GPU: one of B * Hq programs would read all keys of its head alone. The number of parts
depends on shapes and on the GPU's multiprocessors only, so that results repeat bit for bit.

Shapes: as in ``attention``; G = B * Hkv groups, R = Hq / Hkv * T rows, which are the queries of a group, head
by head; tops (2, G, parts, R), of which the second half are totals, and sums (G, parts, R, D), all float32.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ._attention_configs import DECODE_WARPS, decode_config
from ._attention_kernels import _LOG2E, _head, _tile, _visible
from ._library import processors

# Of a tile of queries, by bytes per element: float32 products are three, and have registers for no more.
MOST_ROWS = {2: 64, 4: 16}
MOST_PARTS = 128


@triton.jit
def _rows(x, strides, b, h, t):
    """Where rows (h, t) of batch b start, (M, 1); heads may lie beyond 2^31 elements."""
    x += tl.cast(b, tl.int64) * strides[0]
    return x + (h.to(tl.int64) * strides[1] + t.to(tl.int64) * strides[2])[:, None]


@triton.jit
def _span(documents_ptr, own, first, end, BLOCK: tl.constexpr):
    """[first, end) of keys without the tiles of BLOCK at both ends that hold no document between the smallest
    and the largest of ``own``. Found tile by tile: Triton knows then that the loop over it is aligned."""
    smallest, largest = tl.min(own, axis=0), tl.max(own, axis=0)
    low, high = end, first
    for start in range(first, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        other = tl.load(documents_ptr + s, mask=s < end, other=0)
        shared = (other >= smallest) & (other <= largest) & (s < end)
        found = tl.max(shared.to(tl.int32), axis=0) > 0
        low = tl.where(found, tl.minimum(low, start), low)
        high = tl.where(found, start + BLOCK, high)
    return low, tl.minimum(high, end)


@triton.jit(do_not_specialize=["time", "keys", "length"])
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sums_ptr, tops_ptr, documents_ptr,
    q_strides, k_strides, v_strides, out_strides, heads, group, time, keys, length, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The queries of a group, program_id(0), against a part, program_id(1): ``length`` keys, a multiple of
    BLOCK_N. Without ``sums`` and ``tops`` it is the only one, and its results go to ``out`` and ``lse``."""
    key_heads = heads // group
    g, part = tl.program_id(0), tl.program_id(1)
    b, key_head = g // key_heads, g % key_heads
    r, rows = tl.arange(0, BLOCK_M), group * time
    h, t = key_head * group + r // time, r % time
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (r < rows)[:, None] & (col < D)
    q = tl.load(_rows(q_ptr, q_strides, b, h, t) + col, mask=inside, other=0.0)
    k_ptr = _head(k_ptr, k_strides, b, key_head, False)
    v_ptr = _head(v_ptr, v_strides, b, key_head, False)
    position = keys - time + t
    first = part * length
    end = tl.minimum(first + length, keys)
    if documents_ptr is not None:
        documents_ptr += tl.cast(b, tl.int64) * keys
        first, end = _span(documents_ptr, tl.load(documents_ptr + position), first, end, BLOCK_N)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # tf32x3 products leave no registers for values that LLVM would hoist out of the loop, so hoisting is off.
    for first_key in tl.range(first, end, BLOCK_N, disable_licm=PRECISION == "tf32x3"):
        s = first_key + tl.arange(0, BLOCK_N)
        k = _tile(k_ptr, b, key_head, first_key, k_strides[2], keys, BLOCK_N, D, BLOCK_D, False)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        seen = _visible(position[:, None], s[None, :], keys, documents_ptr, CAUSAL)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(largest, tl.max(scores, axis=1))
        # A row may have seen no visible key yet: -inf - 0 instead of -inf - -inf.
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - safe[:, None])
        correction = tl.exp2(largest - safe)
        total = total * correction + tl.sum(p, axis=1)
        largest = highest
        v = _tile(v_ptr, b, key_head, first_key, v_strides[2], keys, BLOCK_N, D, BLOCK_D, False)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    if sums_ptr is None:
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(_rows(out_ptr, out_strides, b, h, t) + col, out, mask=inside)
        lse = (largest + tl.log2(total)) / _LOG2E
        tl.store(lse_ptr + tl.cast(g, tl.int64) * rows + r, lse, mask=r < rows)
    else:
        at = (tl.cast(g, tl.int64) * tl.num_programs(1) + part) * rows + r
        tl.store(sums_ptr + at[:, None] * D + col, acc, mask=inside)
        tl.store(tops_ptr + at, largest, mask=r < rows)
        tops_ptr += tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * rows
        tl.store(tops_ptr + at, total, mask=r < rows)


@triton.jit(do_not_specialize=["time", "parts", "rows"])
def attention_merge_kernel(
    sums_ptr, tops_ptr, out_ptr, lse_ptr, out_strides, heads, time, parts, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One query of what ``parts`` programs have found, BLOCK_P of them at a time."""
    row = tl.program_id(0)  # (b, h, t) in this order, as (g, r) are
    g, head = row // rows, row // time
    col = tl.arange(0, BLOCK_D)
    largest = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    totals_ptr = tops_ptr + tl.num_programs(0).to(tl.int64) * parts
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        at = (tl.cast(g, tl.int64) * parts + part) * rows + row % rows
        inside = (part < parts)[:, None] & (col < D)[None, :]
        sums = tl.load(sums_ptr + at[:, None] * D + col[None, :], mask=inside, other=0.0)
        top = tl.load(tops_ptr + at, mask=part < parts, other=float("-inf"))
        highest = tl.maximum(largest, tl.max(top, axis=0))
        safe = tl.where(highest == float("-inf"), 0.0, highest)
        weight, correction = tl.exp2(top - safe), tl.exp2(largest - safe)
        found = tl.load(totals_ptr + at, mask=part < parts, other=0.0)
        total = total * correction + tl.sum(weight * found, axis=0)
        acc = acc * correction + tl.sum(weight[:, None] * sums, axis=0)
        largest = highest
    out_ptr = _head(out_ptr, out_strides, head // heads, head % heads, False)
    out_ptr += tl.cast(row % time, tl.int64) * out_strides[2]
    tl.store(out_ptr + col, (acc / total).to(out_ptr.dtype.element_ty), mask=col < D)
    tl.store(lse_ptr + row, (largest + tl.log2(total)) / _LOG2E)


def is_decoding(q: Tensor, k: Tensor, seed: Tensor | None) -> bool:
    """Whether keys precede the queries, of which one tile holds those of a group; not with dropout."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return seed is None and k.shape[2] > q.shape[2] and rows <= MOST_ROWS[q.itemsize]


@functools.lru_cache(maxsize=1024)
def split(groups: int, tiles: int, slots: int) -> tuple[int, int]:
    """(parts that the keys of each of ``groups`` are cut into, tiles of a part; the last may have fewer).

    The length with the least time where ``slots`` programs run at once: rounds of programs times tiles of
    one, with one more for beginning, ending and merging; of equal ones the longest.
    """

    def seconds(length: int) -> int:
        rounds = -(-groups * -(-tiles // length) // slots)
        return rounds * (length + 1)

    lengths = {-(-tiles // parts) for parts in range(1, min(tiles, MOST_PARTS) + 1)}
    length = min(lengths, key=lambda each: (seconds(each), -each))
    return -(-tiles // length), length


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    document_ids: Tensor | None,
) -> None:  # fmt: skip
    """Fills ``out`` (B, Hq, T, D) and ``lse`` (B, Hq, T). Rows of q, k, v and out are contiguous."""
    batch, heads, time, width = q.shape
    key_heads, keys = k.shape[1:3]
    groups, rows = batch * key_heads, heads // key_heads * time
    config = decode_config(q.device, q.itemsize, width, rows)
    slots = DECODE_WARPS // config["num_warps"] * processors(q.device)
    parts, length = split(groups, triton.cdiv(keys, config["BLOCK_N"]), slots)
    sums = tops = None
    if parts > 1:
        sums, tops = lse.new_empty(groups, parts, rows, width), lse.new_empty(2, groups, parts, rows)
    attention_decode_kernel[(groups, parts)](
        q, k, v, out, lse, sums, tops, None if document_ids is None else document_ids.contiguous(),
        *(x.stride()[:3] for x in (q, k, v, out)), heads, heads // key_heads, time, keys,
        length * config["BLOCK_N"], scale, CAUSAL=causal, **config,
    )  # fmt: skip
    if sums is not None:
        block_d = config["BLOCK_D"]
        attention_merge_kernel[(groups * rows,)](
            sums, tops, out, lse, out.stride()[:3], heads, time, parts, rows,
            D=width, BLOCK_D=block_d, BLOCK_P=max(1, 2048 // block_d), num_warps=4,  # 16 elements a thread
        )  # fmt: skip

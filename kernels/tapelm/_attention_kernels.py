"""Triton kernels of ``attention``; its docstring has the maths, its launchers the grids and tiles.

Every kernel takes the (batch, head, time) strides of each tensor as a tuple; the last dimension is
contiguous. With DESCRIPTORS, q, k, v and grad are tensor descriptors, whose tiles the copy engine of sm_90
and later fetches; else they are pointers. Both run the same code but for ``_head`` and ``_tile``. Pointers to
document ids (with the spans of ``document_spans_kernel``) and to the dropout seed may be None, which compiles
them away, as ``before``, how many keys precede those of the queries. Tiles: M queries t, at keys t +
``offset``, and N keys s. Loops ascend in two phases, one of which masks hidden pairs while the other covers
tiles that have none. With document ids every tile of a span may have some, and with dropout masking costs
little beside the random numbers, so both have the masking phase only, which keeps them within registers too.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import keep_mask

_LOG2E = tl.constexpr(1.4426950408889634)
GRAIN = tl.constexpr(16)  # tokens with one span of document_spans_kernel; every tile is a multiple of it


@triton.jit
def _head(x, strides, b, h, DESCRIPTORS: tl.constexpr):
    """Where head h of batch b starts; a descriptor stays whole."""
    if DESCRIPTORS:
        return x
    else:
        return x + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]


@triton.jit
def _tile(
    x, b, h, first, stride, time, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows from ``first`` of x = _head(..., b, h), (ROWS, BLOCK_D); zero beyond time and D."""
    if DESCRIPTORS:
        return x.load([b, h, first, 0]).reshape(ROWS, BLOCK_D)
    else:
        row, col = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        inside = (row[:, None] < time) & (col[None, :] < D)
        return tl.load(x + row[:, None] * stride + col[None, :], mask=inside, other=0.0)


@triton.jit
def _store(ptr, value, row, stride, time, D: tl.constexpr, BLOCK_D: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < time) & (col[None, :] < D)
    # A row of all heads times its index may be beyond 2^31 elements.
    at = row[:, None].to(tl.int64) * stride + col[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def document_spans_kernel(documents_ptr, spans_ptr, time, GRAINS: tl.constexpr, BLOCK: tl.constexpr):
    """spans (B, S / GRAIN, 2) int32: for GRAIN tokens the first position, and one past the last, whose id
    lies between their smallest and largest; outside of it no token shares a document with them."""
    b = tl.program_id(0).to(tl.int64)
    documents_ptr += b * time
    grain = tl.program_id(1) * GRAINS + tl.arange(0, GRAINS)
    t = grain[:, None] * GRAIN + tl.arange(0, GRAIN)[None, :]
    own = tl.load(documents_ptr + t, mask=t < time, other=0)
    smallest = tl.min(tl.where(t < time, own, 2147483647), axis=1)
    largest = tl.max(tl.where(t < time, own, -2147483648), axis=1)
    low = tl.zeros([GRAINS], dtype=tl.int32) + time
    high = tl.zeros([GRAINS], dtype=tl.int32)
    for first in range(0, time, BLOCK):
        s = first + tl.arange(0, BLOCK)
        other = tl.load(documents_ptr + s, mask=s < time, other=0)[None, :]
        shared = (other >= smallest[:, None]) & (other <= largest[:, None]) & (s < time)[None, :]
        low = tl.minimum(low, tl.min(tl.where(shared, s[None, :], time), axis=1))
        high = tl.maximum(high, tl.max(tl.where(shared, s[None, :] + 1, 0), axis=1))
    grains = tl.cdiv(time, GRAIN)
    at = (b * grains + grain) * 2
    tl.store(spans_ptr + at, low, mask=grain < grains)
    tl.store(spans_ptr + at + 1, high, mask=grain < grains)


@triton.jit
def _span(spans_ptr, b, first, keys, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """The span of ROWS tokens from ``first``, which is the first of a grain if ALIGNED."""
    grains = tl.cdiv(keys, GRAIN)
    grain = first // GRAIN + tl.arange(0, ROWS // GRAIN if ALIGNED else 2 * ROWS // GRAIN)
    own = grain < (grains if ALIGNED else tl.minimum(grains, tl.cdiv(first + ROWS, GRAIN)))
    at = spans_ptr + (tl.cast(b, tl.int64) * grains + grain) * 2
    low = tl.load(at, mask=own, other=2147483647)
    return tl.min(low, axis=0), tl.max(tl.load(at + 1, mask=own, other=0), axis=0)


@triton.jit
def _visible(position, s, keys, documents_ptr, CAUSAL: tl.constexpr):
    """Whether the query at ``position`` sees key s; both broadcast against each other."""
    visible = (s < keys) & (s <= position) if CAUSAL else s < keys
    if documents_ptr is not None:
        query_document = tl.load(documents_ptr + position, mask=position < keys, other=-1)
        visible = visible & (query_document == tl.load(documents_ptr + s, mask=s < keys, other=-1))
    return visible


@triton.jit
def _keep(seed_ptr, head, t, first_key, time, keys, threshold, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) dropout mask of queries t and BLOCK_N keys from first_key, a multiple of eight."""
    row = head.to(tl.int64) * time + t
    groups = row[:, None] * ((keys + 7) // 8) + (first_key // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    return keep_mask(tl.load(seed_ptr), groups, threshold)


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, documents_ptr, spans_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, heads, group, time, before, scale, threshold, rescale,
    CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h, key_head = head // heads, head % heads, head % heads // group
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    q_ptr = _head(q_ptr, q_strides, b, h, DESCRIPTORS)
    k_ptr = _head(k_ptr, k_strides, b, key_head, DESCRIPTORS)
    v_ptr = _head(v_ptr, v_strides, b, key_head, DESCRIPTORS)
    t = first + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr, b, h, first, q_strides[2], time, BLOCK_M, D, BLOCK_D, DESCRIPTORS)
    # Keys in [0, unmasked) are visible to all of these queries, keys from end on to none.
    offset = 0 if before is None else before
    keys, position = time + offset, t + offset
    end = tl.minimum(first + BLOCK_M + offset, keys) if CAUSAL else keys
    LAST: tl.constexpr = 0 if documents_ptr is not None or seed_ptr is not None else 1
    unmasked = 0 if LAST == 0 else (first + offset if CAUSAL else keys) // BLOCK_N * BLOCK_N
    if documents_ptr is not None:
        documents_ptr += tl.cast(b, tl.int64) * keys
        low, high = _span(spans_ptr, b, first + offset, keys, BLOCK_M, before is None)
        unmasked, end = low // BLOCK_N * BLOCK_N, tl.minimum(end, high)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # tf32x3 products leave no registers for values that LLVM would hoist out of the loop, so hoisting is off.
    # Heads of 128 have registers left, and spill on sm_90 without hoisting.
    IN_PLACE: tl.constexpr = PRECISION == "tf32x3" and BLOCK_D != 128
    for phase in tl.static_range(LAST + 1):
        for first_key in tl.range(
            unmasked if phase == LAST else 0, end if phase == LAST else unmasked, BLOCK_N,
            disable_licm=IN_PLACE,
        ):  # fmt: skip
            s = first_key + tl.arange(0, BLOCK_N)
            k = _tile(k_ptr, b, key_head, first_key, k_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
            if phase == LAST:
                seen = _visible(position[:, None], s[None, :], keys, documents_ptr, CAUSAL)
                scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            # A row may have seen no visible key yet: -inf - 0 instead of -inf - -inf.
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(scores - safe[:, None])
            correction = tl.exp2(largest - safe)
            total = total * correction + tl.sum(p, axis=1)
            largest = highest
            if seed_ptr is not None:
                kept = _keep(seed_ptr, head, t, first_key, time, keys, threshold, BLOCK_N)
                p = tl.where(kept, p * rescale, 0.0)
            v = _tile(v_ptr, b, key_head, first_key, v_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
            acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    total = tl.where(t < time, total, 1.0)
    out_ptr = _head(out_ptr, out_strides, b, h, False)
    _store(out_ptr, acc / total[:, None], t, out_strides[2], time, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * time + t, (largest + tl.log2(total)) / _LOG2E, mask=t < time)


@triton.jit
def attention_delta_kernel(
    grad_ptr, out_ptr, delta_ptr, grad_strides, out_strides, heads, time,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h = head // heads, head % heads
    first = tl.program_id(1) * BLOCK_M
    t = first + tl.arange(0, BLOCK_M)
    grad_ptr = _head(grad_ptr, grad_strides, b, h, False)
    out_ptr = _head(out_ptr, out_strides, b, h, False)
    grad = _tile(grad_ptr, b, h, first, grad_strides[2], time, BLOCK_M, D, BLOCK_D, False)
    out = _tile(out_ptr, b, h, first, out_strides[2], time, BLOCK_M, D, BLOCK_D, False)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * time + t, delta, mask=t < time)


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, documents_ptr, spans_ptr, seed_ptr,
    grad_strides, q_strides, k_strides, v_strides, dk_strides, heads, group, time, before, scale, threshold,
    rescale, CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head over the query heads that share it; scores are (N, M)."""
    key_heads = heads // group
    b, key_head = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    offset = 0 if before is None else before
    first_key, keys = tl.program_id(1) * BLOCK_N, time + offset
    s = first_key + tl.arange(0, BLOCK_N)
    k_ptr = _head(k_ptr, k_strides, b, key_head, DESCRIPTORS)
    v_ptr = _head(v_ptr, v_strides, b, key_head, DESCRIPTORS)
    k = _tile(k_ptr, b, key_head, first_key, k_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    v = _tile(v_ptr, b, key_head, first_key, v_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # Queries before start see none of these keys; queries from unmasked on see all of them.
    first_query = first_key if before is None else tl.maximum(first_key - before, 0)
    start = first_query // BLOCK_M * BLOCK_M if CAUSAL else 0
    MASK_ALL: tl.constexpr = documents_ptr is not None or seed_ptr is not None
    unmasked = tl.cdiv(first_query + BLOCK_N, BLOCK_M) * BLOCK_M if CAUSAL else 0
    unmasked = time if MASK_ALL else tl.minimum(unmasked, time)
    if documents_ptr is not None:
        documents_ptr += tl.cast(b, tl.int64) * keys
        low, unmasked = _span(spans_ptr, b, first_key, keys, BLOCK_N, True)
        if before is not None:
            low, unmasked = tl.maximum(low - before, 0), unmasked - before
        start = tl.maximum(start, low // BLOCK_M * BLOCK_M)
    for h in range(key_head * group, key_head * group + group):
        grad_head = _head(grad_ptr, grad_strides, b, h, DESCRIPTORS)
        q_head = _head(q_ptr, q_strides, b, h, DESCRIPTORS)
        head = tl.cast(b, tl.int64) * heads + h
        for phase in tl.static_range(1 if MASK_ALL else 2):
            for first in range(start if phase == 0 else unmasked, unmasked if phase == 0 else time, BLOCK_M):
                t = first + tl.arange(0, BLOCK_M)
                q = _tile(q_head, b, h, first, q_strides[2], time, BLOCK_M, D, BLOCK_D, DESCRIPTORS)
                grad = _tile(grad_head, b, h, first, grad_strides[2], time, BLOCK_M, D, BLOCK_D, DESCRIPTORS)
                # Rows beyond time get weight exp2(-inf) = 0.
                lse = tl.load(lse_ptr + head * time + t, mask=t < time, other=float("inf"))
                delta = tl.load(delta_ptr + head * time + t, mask=t < time, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
                p = tl.exp2(scores - (lse * _LOG2E)[None, :])
                if phase == 0:
                    seen = _visible((t + offset)[None, :], s[:, None], keys, documents_ptr, CAUSAL)
                    p = tl.where(seen, p, 0.0)
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                r = p
                if seed_ptr is not None:
                    kept = tl.trans(_keep(seed_ptr, head, t, first_key, time, keys, threshold, BLOCK_N))
                    r = tl.where(kept, p * rescale, 0.0)
                    dp = tl.where(kept, dp * rescale, 0.0)
                dv = tl.dot(r.to(grad.dtype), grad, dv, input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr = _head(dk_ptr, dk_strides, b, key_head, False)
    dv_ptr = _head(dv_ptr, dk_strides, b, key_head, False)
    _store(dk_ptr, dk * scale, s, dk_strides[2], keys, D, BLOCK_D)
    _store(dv_ptr, dv, s, dk_strides[2], keys, D, BLOCK_D)


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, documents_ptr, spans_ptr, seed_ptr,
    grad_strides, q_strides, k_strides, v_strides, dq_strides, heads, group, time, before, scale, threshold,
    rescale, CAUSAL: tl.constexpr, DESCRIPTORS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    head = tl.program_id(0)
    b, h, key_head = head // heads, head % heads, head % heads // group
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    q_ptr = _head(q_ptr, q_strides, b, h, DESCRIPTORS)
    grad_ptr = _head(grad_ptr, grad_strides, b, h, DESCRIPTORS)
    k_ptr = _head(k_ptr, k_strides, b, key_head, DESCRIPTORS)
    v_ptr = _head(v_ptr, v_strides, b, key_head, DESCRIPTORS)
    t = first + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr, b, h, first, q_strides[2], time, BLOCK_M, D, BLOCK_D, DESCRIPTORS)
    grad = _tile(grad_ptr, b, h, first, grad_strides[2], time, BLOCK_M, D, BLOCK_D, DESCRIPTORS)
    row = head.to(tl.int64) * time + t
    lse = tl.load(lse_ptr + row, mask=t < time, other=float("inf")) * _LOG2E
    # The scale of the dropout is a factor of the whole gradient, so that the loop is without it.
    delta = tl.load(delta_ptr + row, mask=t < time, other=0.0) / rescale
    offset = 0 if before is None else before
    keys, position = time + offset, t + offset
    end = tl.minimum(first + BLOCK_M + offset, keys) if CAUSAL else keys
    LAST: tl.constexpr = 0 if documents_ptr is not None or seed_ptr is not None else 1
    unmasked = 0 if LAST == 0 else (first + offset if CAUSAL else keys) // BLOCK_N * BLOCK_N
    if documents_ptr is not None:
        documents_ptr += tl.cast(b, tl.int64) * keys
        low, high = _span(spans_ptr, b, first + offset, keys, BLOCK_M, before is None)
        unmasked, end = low // BLOCK_N * BLOCK_N, tl.minimum(end, high)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for phase in tl.static_range(LAST + 1):
        for first_key in range(unmasked if phase == LAST else 0, end if phase == LAST else unmasked, BLOCK_N):
            s = first_key + tl.arange(0, BLOCK_N)
            k = _tile(k_ptr, b, key_head, first_key, k_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
            v = _tile(v_ptr, b, key_head, first_key, v_strides[2], keys, BLOCK_N, D, BLOCK_D, DESCRIPTORS)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E) - lse[:, None])
            if phase == LAST:
                p = tl.where(_visible(position[:, None], s[None, :], keys, documents_ptr, CAUSAL), p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if seed_ptr is not None:
                kept = _keep(seed_ptr, head, t, first_key, time, keys, threshold, BLOCK_N)
                dp = tl.where(kept, dp, 0.0)
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr = _head(dq_ptr, dq_strides, b, h, False)
    _store(dq_ptr, dq * (scale * rescale), t, dq_strides[2], time, D, BLOCK_D)

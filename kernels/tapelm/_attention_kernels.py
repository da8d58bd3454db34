"""Triton kernels of ``attention``; its docstring has the maths, its launchers the grids and tiles.

Every kernel takes the (batch, head, time) strides of each tensor as a tuple; the last dimension is
contiguous. Pointers to document ids and to the dropout seed may be None, which compiles them away. Tiles: M
queries t, N keys s. Loops ascend in two phases, one of which masks hidden pairs while the other covers the
tiles that have none. With document ids every tile may have some, and with dropout masking costs little beside
the random numbers, so both have the masking phase only, which also keeps them within their registers.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_mask

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, row, stride, time, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``row`` of one head, (R, BLOCK_D); zero beyond time and D."""
    col = tl.arange(0, BLOCK_D)
    return tl.load(
        ptr + row[:, None] * stride + col[None, :], mask=(row[:, None] < time) & (col[None, :] < D), other=0.0
    )


@triton.jit
def _store(ptr, value, row, stride, time, D: tl.constexpr, BLOCK_D: tl.constexpr):
    col = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < time) & (col[None, :] < D)
    tl.store(ptr + row[:, None] * stride + col[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _visible(t, s, time, documents_ptr, CAUSAL: tl.constexpr):
    """Whether query t sees key s; t and s broadcast against each other."""
    visible = s < time
    if CAUSAL:
        visible = visible & (s <= t)
    if documents_ptr is not None:
        query_document = tl.load(documents_ptr + t, mask=t < time, other=-1)
        visible = visible & (query_document == tl.load(documents_ptr + s, mask=s < time, other=-1))
    return visible


@triton.jit
def _keep(seed_ptr, head, t, first_key, time, threshold, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) dropout mask of queries t and BLOCK_N keys from first_key, a multiple of four."""
    row = head.to(tl.int64) * time + t
    groups = row[:, None] * ((time + 3) // 4) + (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    return keep_mask(tl.load(seed_ptr), groups, threshold)


@triton.jit(do_not_specialize=["threshold"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, documents_ptr, seed_ptr,
    q_strides, k_strides, v_strides, out_strides, heads, group, time, scale, threshold, rescale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), head % heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest rows start first
    k_ptr += b * k_strides[0] + (h // group) * k_strides[1]
    v_ptr += b * v_strides[0] + (h // group) * v_strides[1]
    if documents_ptr is not None:
        documents_ptr += b * time
    t = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], time, D, BLOCK_D)
    # Keys in [0, unmasked) are visible to all of these queries, keys from end on to none.
    end = tl.minimum(first + BLOCK_M, time) if CAUSAL else time
    LAST: tl.constexpr = 0 if documents_ptr is not None or seed_ptr is not None else 1
    unmasked = 0 if LAST == 0 else (first if CAUSAL else time) // BLOCK_N * BLOCK_N
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for phase in tl.static_range(LAST + 1):
        for first_key in range(unmasked if phase == LAST else 0, end if phase == LAST else unmasked, BLOCK_N):
            s = first_key + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, s, k_strides[2], time, D, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
            if phase == LAST:
                scores = tl.where(
                    _visible(t[:, None], s[None, :], time, documents_ptr, CAUSAL), scores, float("-inf")
                )
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            # A row may have seen no visible key yet: -inf - 0 instead of -inf - -inf.
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(scores - safe[:, None])
            correction = tl.exp2(largest - safe)
            total = total * correction + tl.sum(p, axis=1)
            largest = highest
            if seed_ptr is not None:
                p = tl.where(_keep(seed_ptr, head, t, first_key, time, threshold, BLOCK_N), p * rescale, 0.0)
            v = _load(v_ptr, s, v_strides[2], time, D, BLOCK_D)
            acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
    total = tl.where(t < time, total, 1.0)
    out_ptr += b * out_strides[0] + h * out_strides[1]
    _store(out_ptr, acc / total[:, None], t, out_strides[2], time, D, BLOCK_D)
    tl.store(lse_ptr + head.to(tl.int64) * time + t, (largest + tl.log2(total)) / _LOG2E, mask=t < time)


@triton.jit
def attention_delta_kernel(
    grad_ptr, out_ptr, delta_ptr, grad_strides, out_strides, heads, time,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), head % heads
    t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    grad = _load(grad_ptr + b * grad_strides[0] + h * grad_strides[1], t, grad_strides[2], time, D, BLOCK_D)
    out = _load(out_ptr + b * out_strides[0] + h * out_strides[1], t, out_strides[2], time, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head.to(tl.int64) * time + t, delta, mask=t < time)


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, documents_ptr, seed_ptr,
    grad_strides, q_strides, k_strides, v_strides, dk_strides, heads, group, time, scale, threshold, rescale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head over the query heads that share it; scores are (N, M)."""
    key_heads = heads // group
    b, key_head = (tl.program_id(0) // key_heads).to(tl.int64), tl.program_id(0) % key_heads
    first_key = tl.program_id(1) * BLOCK_N
    s = first_key + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + b * k_strides[0] + key_head * k_strides[1], s, k_strides[2], time, D, BLOCK_D)
    v = _load(v_ptr + b * v_strides[0] + key_head * v_strides[1], s, v_strides[2], time, D, BLOCK_D)
    if documents_ptr is not None:
        documents_ptr += b * time
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    # Queries before start see none of these keys; queries from unmasked on see all of them.
    start = first_key // BLOCK_M * BLOCK_M if CAUSAL else 0
    MASK_ALL: tl.constexpr = documents_ptr is not None or seed_ptr is not None
    unmasked = tl.cdiv(first_key + BLOCK_N, BLOCK_M) * BLOCK_M if CAUSAL else 0
    unmasked = time if MASK_ALL else tl.minimum(unmasked, time)
    for h in range(key_head * group, key_head * group + group):
        grad_head = grad_ptr + b * grad_strides[0] + h * grad_strides[1]
        q_head = q_ptr + b * q_strides[0] + h * q_strides[1]
        head = b * heads + h
        for phase in tl.static_range(1 if MASK_ALL else 2):
            for first in range(start if phase == 0 else unmasked, unmasked if phase == 0 else time, BLOCK_M):
                t = first + tl.arange(0, BLOCK_M)
                q = _load(q_head, t, q_strides[2], time, D, BLOCK_D)
                grad = _load(grad_head, t, grad_strides[2], time, D, BLOCK_D)
                # Rows beyond time get weight exp2(-inf) = 0.
                lse = tl.load(lse_ptr + head * time + t, mask=t < time, other=float("inf"))
                delta = tl.load(delta_ptr + head * time + t, mask=t < time, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
                p = tl.exp2(scores - (lse * _LOG2E)[None, :])
                if phase == 0:
                    p = tl.where(_visible(t[None, :], s[:, None], time, documents_ptr, CAUSAL), p, 0.0)
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                r = p
                if seed_ptr is not None:
                    kept = tl.trans(_keep(seed_ptr, head, t, first_key, time, threshold, BLOCK_N))
                    r = tl.where(kept, p * rescale, 0.0)
                    dp = tl.where(kept, dp * rescale, 0.0)
                dv = tl.dot(r.to(grad.dtype), grad, dv, input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = b * dk_strides[0] + key_head * dk_strides[1]
    _store(dk_ptr + at, dk * scale, s, dk_strides[2], time, D, BLOCK_D)
    _store(dv_ptr + at, dv, s, dk_strides[2], time, D, BLOCK_D)


@triton.jit(do_not_specialize=["threshold"])
def attention_backward_queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, documents_ptr, seed_ptr,
    grad_strides, q_strides, k_strides, v_strides, dq_strides, heads, group, time, scale, threshold, rescale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), head % heads
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    k_ptr += b * k_strides[0] + (h // group) * k_strides[1]
    v_ptr += b * v_strides[0] + (h // group) * v_strides[1]
    if documents_ptr is not None:
        documents_ptr += b * time
    t = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr + b * q_strides[0] + h * q_strides[1], t, q_strides[2], time, D, BLOCK_D)
    grad = _load(grad_ptr + b * grad_strides[0] + h * grad_strides[1], t, grad_strides[2], time, D, BLOCK_D)
    row = head.to(tl.int64) * time + t
    lse = tl.load(lse_ptr + row, mask=t < time, other=float("inf")) * _LOG2E
    delta = tl.load(delta_ptr + row, mask=t < time, other=0.0)
    end = tl.minimum(first + BLOCK_M, time) if CAUSAL else time
    LAST: tl.constexpr = 0 if documents_ptr is not None or seed_ptr is not None else 1
    unmasked = 0 if LAST == 0 else (first if CAUSAL else time) // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for phase in tl.static_range(LAST + 1):
        for first_key in range(unmasked if phase == LAST else 0, end if phase == LAST else unmasked, BLOCK_N):
            s = first_key + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, s, k_strides[2], time, D, BLOCK_D)
            v = _load(v_ptr, s, v_strides[2], time, D, BLOCK_D)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E) - lse[:, None])
            if phase == LAST:
                p = tl.where(_visible(t[:, None], s[None, :], time, documents_ptr, CAUSAL), p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if seed_ptr is not None:
                dp = tl.where(
                    _keep(seed_ptr, head, t, first_key, time, threshold, BLOCK_N), dp * rescale, 0.0
                )
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr += b * dq_strides[0] + h * dq_strides[1]
    _store(dq_ptr, dq * scale, t, dq_strides[2], time, D, BLOCK_D)

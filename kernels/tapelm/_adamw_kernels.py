"""Triton kernels of AdamW and of the gradient norm, over a table of chunks.

The arithmetic is that of csrc/adamw.inl operation for operation: divisions and roots are rounded correctly,
and the launch turns off the contraction of a product and a sum into one rounding (`enable_fp_fusion`), so
that the same clip factor gives the same bits on every device.
"""

# pyright: reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from ._philox import random_words

QUANT: tl.constexpr = tl.constexpr(256)  # elements of an 8-bit moment that share a scale


@triton.jit
def _address(table_ptr, column: tl.constexpr, chunks, dtype: tl.constexpr):
    # Every chunk starts on a 16-byte boundary, which lets loads be 128 bits wide.
    address = tl.load(table_ptr + column * chunks + tl.program_id(0))
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def grad_norm_kernel(table_ptr, partial_ptr, chunks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """table (2, chunks): address and length; partial (chunks,) sums of squares."""
    grad_ptr = _address(table_ptr, 0, chunks, DTYPE)
    length = tl.load(table_ptr + chunks + tl.program_id(0)).to(tl.int32)
    whole = length // BLOCK * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # Whole blocks go without a mask, which would keep their loads from being 128 bits wide.
    for masked in tl.static_range(2):
        for first in range(whole if masked else 0, length if masked else whole, BLOCK):
            at = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < length if masked else None, other=0.0 if masked else None)
            total += grad.to(tl.float32) * grad.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _random_words(key, first, BLOCK: tl.constexpr):
    """The Philox words of elements first ... first + BLOCK; first is a multiple of four."""
    return random_words(key, first // 4 + tl.arange(0, BLOCK // 4))


@triton.jit
def _round_stochastically(x, words):
    """16 random bits are added below the last bit of a bfloat16, the rest is cut."""
    bits = (x.to(tl.uint32, bitcast=True) + (words & 0xFFFF)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _dequantize(codes, scale, SIGNED: tl.constexpr):
    """codes (R, QUANT) uint8, scale (R,) -> float32; the code is described in csrc/adamw.inl."""
    LARGEST: tl.constexpr = 127 if SIGNED else 255
    codes = codes.to(tl.uint32)
    magnitude = codes & LARGEST
    value = ((magnitude + (1016 - LARGEST)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude != 0, value, 0.0) * scale[:, None]
    if SIGNED:
        value = (value.to(tl.uint32, bitcast=True) | ((codes & 128) << 24)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _quantize(x, words, SIGNED: tl.constexpr):
    """x (R, QUANT) float32 -> codes, scale (R,)."""
    LARGEST: tl.constexpr = 127 if SIGNED else 255
    BIAS: tl.constexpr = 1016 - LARGEST
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Magnitudes as integers are ordered as the floats are, NaN above inf.
    scale = tl.maximum(tl.max(magnitude.to(tl.int32), axis=1), 0x00800000).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    code = magnitude.to(tl.float32, bitcast=True) * inverse[:, None]
    code = code.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    code = (code + (0x80000 if SIGNED else (words >> 16) << 4)) >> 20
    code = tl.minimum(tl.maximum(code.to(tl.int32) - BIAS, 0 if SIGNED else 1), LARGEST)
    code = tl.where(magnitude != 0, code, 0).to(tl.uint32)
    if SIGNED:
        code = code | ((bits >> 31) << 7)
    return code.to(tl.uint8), scale


@triton.jit
def _update(p, g, m, v, rate1, beta2, rate2, eps, decay, step_size, inverse_root_correction):
    m = m + (g - m) * rate1
    v = v * beta2 + g * g * rate2
    p = p * decay - step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_correction + eps)
    return p, m, v


@triton.jit(do_not_specialize=["key"])
def adamw_kernel(
    table_ptr, grad_scale_ptr, chunks, rate1, beta2, rate2, eps, decay, step_size, inverse_root_correction,
    key, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table (7, chunks): addresses of param, grad, m, v and master (param again without one), index of the
    first element among the random words, length."""
    param_ptr = _address(table_ptr, 0, chunks, DTYPE)
    grad_ptr = _address(table_ptr, 1, chunks, GRAD_DTYPE)
    m_ptr = _address(table_ptr, 2, chunks, tl.float32)
    v_ptr = _address(table_ptr, 3, chunks, tl.float32)
    master_ptr = _address(table_ptr, 4, chunks, tl.float32 if HAS_MASTER else DTYPE)
    first_word = tl.load(table_ptr + 5 * chunks + tl.program_id(0))
    length = tl.load(table_ptr + 6 * chunks + tl.program_id(0)).to(tl.int32)
    whole = length // BLOCK * BLOCK
    grad_scale = tl.load(grad_scale_ptr)
    for masked in tl.static_range(2):
        for first in range(whole if masked else 0, length if masked else whole, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < length if masked else None
            g = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * grad_scale
            m = tl.load(m_ptr + at, mask=inside)
            v = tl.load(v_ptr + at, mask=inside)
            p = tl.load(master_ptr + at, mask=inside).to(tl.float32)
            p, m, v = _update(p, g, m, v, rate1, beta2, rate2, eps, decay, step_size, inverse_root_correction)
            tl.store(m_ptr + at, m, mask=inside)
            tl.store(v_ptr + at, v, mask=inside)
            if HAS_MASTER:
                tl.store(master_ptr + at, p, mask=inside)
            if STOCHASTIC:
                p = _round_stochastically(p, _random_words(key, first_word + first, BLOCK))
            tl.store(param_ptr + at, p.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["key"])
def adamw8_kernel(
    table_ptr, grad_scale_ptr, chunks, rate1, beta2, rate2, eps, decay, step_size, inverse_root_correction,
    key, DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``adamw_kernel`` with 8-bit moments; table (9, chunks): as there, the scales of m and v before the last
    two."""
    param_ptr = _address(table_ptr, 0, chunks, DTYPE)
    grad_ptr = _address(table_ptr, 1, chunks, GRAD_DTYPE)
    m_ptr = _address(table_ptr, 2, chunks, tl.uint8)
    v_ptr = _address(table_ptr, 3, chunks, tl.uint8)
    master_ptr = _address(table_ptr, 4, chunks, tl.float32 if HAS_MASTER else DTYPE)
    m_scale_ptr = _address(table_ptr, 5, chunks, tl.float32)
    v_scale_ptr = _address(table_ptr, 6, chunks, tl.float32)
    first_word = tl.load(table_ptr + 7 * chunks + tl.program_id(0))
    length = tl.load(table_ptr + 8 * chunks + tl.program_id(0)).to(tl.int32)
    whole = length // BLOCK * BLOCK
    grad_scale = tl.load(grad_scale_ptr)
    for masked in tl.static_range(2):
        for first in range(whole if masked else 0, length if masked else whole, BLOCK):
            row, col = tl.arange(0, BLOCK // QUANT), tl.arange(0, QUANT)
            # A reshaped range would do, but Triton 3.7 forgets that it is contiguous.
            at = first + row[:, None] * QUANT + col[None, :]
            inside = at < length if masked else None
            fill = 0.0 if masked else None
            block = first // QUANT + row
            some = block * QUANT < length if masked else None
            words = tl.reshape(_random_words(key, first_word + first, BLOCK), [BLOCK // QUANT, QUANT])
            g = tl.load(grad_ptr + at, mask=inside, other=fill).to(tl.float32) * grad_scale
            p = tl.load(master_ptr + at, mask=inside, other=fill).to(tl.float32)
            # Elements past the end are zeros, which change no scale.
            m = _dequantize(
                tl.load(m_ptr + at, mask=inside, other=0 if masked else None),
                tl.load(m_scale_ptr + block, mask=some, other=fill), True,
            )  # fmt: skip
            v = _dequantize(
                tl.load(v_ptr + at, mask=inside, other=0 if masked else None),
                tl.load(v_scale_ptr + block, mask=some, other=fill), False,
            )  # fmt: skip
            p, m, v = _update(p, g, m, v, rate1, beta2, rate2, eps, decay, step_size, inverse_root_correction)
            codes, scale = _quantize(m, words, True)
            tl.store(m_ptr + at, codes, mask=inside)
            tl.store(m_scale_ptr + block, scale, mask=some)
            codes, scale = _quantize(v, words, False)
            tl.store(v_ptr + at, codes, mask=inside)
            tl.store(v_scale_ptr + block, scale, mask=some)
            if HAS_MASTER:
                tl.store(master_ptr + at, p, mask=inside)
            if STOCHASTIC:
                p = _round_stochastically(p, words)
            tl.store(param_ptr + at, p.to(DTYPE), mask=inside)

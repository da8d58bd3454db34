"""Triton kernels that quantize to NF4 and back, and what launching with NF4 needs; nf4.py has the maths.

Products and sums stay apart (``enable_fp_fusion=False``): fused ones would not give bitsandbytes' bytes.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# The 16 quantiles of a normal distribution, scaled to [-1, 1] [Dettmers et al., 2023, appendix E].
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANTIZED = 2048  # elements per program of 4 warps; twice as many spill
DEQUANTIZED = 4096  # elements per program of 4 warps: 16 bytes of indices for each thread
NESTED_BLOCK = 256  # scales that share one of their own, per program of 2 warps; the kernels write it out


@functools.cache
def _constant(kind: str, device: torch.device) -> Tensor:
    """The 16 codes, or the 15 values halfway between them, on ``device``."""
    codes = torch.tensor(CODES)
    values = codes if kind == "codes" else torch.nn.functional.pad((codes[:-1] + codes[1:]) / 2, (0, 1))
    return values.to(device)


def codes_on(device: torch.device) -> Tensor:
    return _constant("codes", device)


@triton.jit
def nf4_quantize_kernel(
    w_ptr, bounds_ptr, packed_ptr, absmax_ptr, numel, bytes, SIZE: tl.constexpr, BLOCKS: tl.constexpr
):
    """BLOCKS blocks of SIZE elements: their scales and indices."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    w = tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    absmax = tl.where(tl.max((w != w).to(tl.int32), axis=1) > 0, float("nan"), absmax)
    divisor = tl.where(absmax < 1e-38, 1e-38, absmax)
    x = w * tl.math.div_rn(tl.full([BLOCKS], 1.0, tl.float32), divisor)[:, None]
    # A last block that is not whole never has the scale 0.
    absmax = tl.where((block + 1) * SIZE > numel, divisor, absmax)
    q = tl.zeros([BLOCKS, SIZE], dtype=tl.int32)
    for i in tl.static_range(15):
        q += tl.where(x <= tl.load(bounds_ptr + i), 0, 1)
    even, odd = tl.split(tl.reshape(q, [BLOCKS, SIZE // 2, 2]))
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    tl.store(packed_ptr + byte, ((even << 4) | odd).to(tl.uint8), mask=byte < bytes)
    tl.store(absmax_ptr + block, absmax, mask=block * SIZE < numel)


@triton.jit
def nf4_scales_kernel(absmax_ptr, offset_ptr, map_ptr, absmax8_ptr, nested_ptr, blocks, BLOCK: tl.constexpr):
    """One block of 256 scales: what is left of them without their mean, as indices into the map."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(absmax_ptr + at, mask=at < blocks, other=0.0) - tl.load(offset_ptr)
    x = tl.where(at < blocks, x, 0.0)
    largest = tl.max(tl.abs(x), axis=0)
    scaled = x * tl.math.div_rn(1.0 + tl.zeros([BLOCK], tl.float32), largest + tl.zeros([BLOCK], tl.float32))
    place = (scaled + 1.0) * 0.5 * 65535.0 + 0.5
    grid = tl.where(place > 0.0, tl.minimum(place, 65535.0), 0.0).to(tl.int32).to(tl.float32)
    value = tl.math.div_rn(2.0 * grid, tl.full([BLOCK], 65535.0, tl.float32)) - 1.0
    # How many values halfway between two of the map are below: the bits of the count from the highest down.
    entry = tl.arange(0, 256)
    values = tl.load(map_ptr + entry)
    middles = 0.5 * (tl.gather(values, tl.maximum(entry - 1, 0), 0) + values)
    code = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(8):
        middle = tl.gather(middles, code + (128 >> i), 0)
        code = tl.where(middle < value, code + (128 >> i), code)
    tl.store(absmax8_ptr + at, code.to(tl.uint8), mask=at < blocks)
    tl.store(nested_ptr + tl.program_id(0), largest)


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codes_ptr, out_ptr, numel, bytes,
    NESTED: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(absmax_ptr + block, mask=block * SIZE < numel, other=0)
    if NESTED:
        # 256 is a multiple of BLOCKS: the program has one nested scale.
        nested = tl.load(nested_ptr + tl.program_id(0) * BLOCKS // 256)
        scale = tl.load(map_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < bytes, other=0)
    codes = tl.load(codes_ptr + tl.arange(0, 16))
    q = tl.reshape(tl.join(packed >> 4, packed & 15), [BLOCKS * SIZE])
    w = tl.reshape(tl.gather(codes, q.to(tl.int32), 0), [BLOCKS, SIZE]) * scale[:, None]
    at = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def load_scales(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, mask, NESTED: tl.constexpr):
    """The scales of the given blocks."""
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        scale = tl.load(map_ptr + scale.to(tl.int32)) * tl.load(
            nested_ptr + block // 256, mask=mask, other=0.0
        )
        scale += tl.load(offset_ptr)
    return scale


def launch_quantize(w: Tensor, block_size: int, map: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triton launch of ``tapelm::nf4_quantize``; the mean of the scales lies between its two kernels."""
    check_block_size("nf4_quantize", block_size)
    w = w.contiguous()
    numel, blocks = w.numel(), triton.cdiv(w.numel(), block_size)
    packed = w.new_empty((triton.cdiv(numel, 2), 1), dtype=torch.uint8)
    absmax = w.new_empty(blocks, dtype=torch.float32)
    if numel:
        per_program = max(1, QUANTIZED // block_size)
        nf4_quantize_kernel[(triton.cdiv(blocks, per_program),)](
            w, _constant("bounds", w.device), packed, absmax, numel, packed.numel(),
            SIZE=block_size, BLOCKS=per_program, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    if map is None:
        return packed, absmax, absmax.new_empty(0), absmax.new_empty(0)
    absmax8 = absmax.new_empty(blocks, dtype=torch.uint8)
    nested = absmax.new_empty(triton.cdiv(blocks, NESTED_BLOCK))
    offset = absmax.mean() if numel else absmax.new_zeros(())
    if numel:
        nf4_scales_kernel[(nested.numel(),)](
            absmax, offset, map, absmax8, nested, blocks,
            BLOCK=NESTED_BLOCK, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax8, nested, offset


def launch_dequantize(
    packed: Tensor, state: Sequence[Tensor], block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Triton launch of ``tapelm::nf4_dequantize``: scales and weight in one."""
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    check_state(packed, state, block_size, out.numel(), "nf4_dequantize")
    if out.numel():
        per_program = max(1, DEQUANTIZED // block_size)
        nf4_dequantize_kernel[(triton.cdiv(out.numel(), per_program * block_size),)](
            packed, *scale_arguments(state), codes_on(packed.device), out, out.numel(), packed.numel(),
            NESTED=len(state) > 1, SIZE=block_size, BLOCKS=per_program, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def scale_arguments(state: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """absmax, nested_absmax, offset and map for a kernel; absmax stands in for what there is not."""
    absmax, nested, offset, map = state if len(state) > 1 else [state[0]] * 4
    return absmax, nested, offset, map


def check_block_size(op: str, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{op}: block_size is {block_size}; use one of {BLOCK_SIZES}.")


def check_state(packed: Tensor, state: Sequence[Tensor], block_size: int, numel: int, op: str) -> None:
    """Raises unless the tensors hold a quantized weight of ``numel`` elements, as nf4.cpp does on the CPU."""
    check_block_size(op, block_size)
    blocks = math.ceil(numel / block_size)
    wanted = [("packed", packed, torch.uint8, math.ceil(numel / 2))]
    if len(state) == 1:
        wanted.append(("absmax", state[0], torch.float32, blocks))
    elif len(state) == 4:
        sizes = (blocks, math.ceil(blocks / NESTED_BLOCK), 1, 256)
        dtypes = (torch.uint8, torch.float32, torch.float32, torch.float32)
        names = ("absmax", "nested_absmax", "offset", "map")
        wanted += zip(names, state, dtypes, sizes, strict=True)
    else:
        raise ValueError(f"{op}: state must be [absmax] or [absmax, nested_absmax, offset, map].")
    for name, tensor, dtype, size in wanted:
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {dtype} is needed.")
        if tensor.numel() != size or not tensor.is_contiguous() or tensor.device != packed.device:
            raise ValueError(
                f"{op}: {name} must be contiguous, on {packed.device}, and have {size} elements,"
                f" not {tensor.numel()}."
            )

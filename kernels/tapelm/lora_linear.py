"""Frozen linear layer with a trained low-rank update; the weight is dense or NF4.

    u = x A^T        y = x W^T + scaling * u B^T
    v = grad B       dx = grad W + scaling * v A        dA = scaling * v^T x        dB = scaling * grad^T u

[Hu et al., "LoRA", 2021; W in NF4: Dettmers et al., "QLoRA", 2023]. W gets no gradient. On CUDA one kernel
sums the low-rank product and then goes on over W, dequantized tile by tile; on the CPU W is dequantized where
our product packs it, for up to four rows while it is multiplied, and for ATen's product in parts of a few
million elements.

Shapes: x, dx (..., K); y, grad (..., N); W (N, K); A, dA (R, K); B, dB (N, R); u, v (rows, R), all of one
dtype, to which W is dequantized.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._library import (
    architecture,
    autocast,
    check_is_tensor,
    check_tensors,
    configured_architecture,
    register_cuda,
    register_fake,
)
from ._nf4_kernels import check_state, codes_on, load_scales, scale_arguments
from .nf4 import NF4Weight, nf4_dequantize_reference


def lora_linear_reference(
    x: Tensor, weight: Tensor | NF4Weight, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    dense = nf4_dequantize_reference(weight, x.dtype) if isinstance(weight, NF4Weight) else weight
    return x @ dense.detach().to(x.dtype).T + scaling * ((x @ a.T) @ b.T)


@triton.jit
def weight_tile(
    w_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codes_ptr, n, k, N, K,
    KIND: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """W[n, k] in float32 (KIND "nf4", "nested") or as it is ("dense"); what lies outside is finite.

    EVEN: rows begin at a byte. UNIFORM: the tile has one scale per row.
    """
    at = n[:, None].to(tl.int64) * K + k[None, :]
    inside = (n[:, None] < N) & (k[None, :] < K)
    if KIND == "dense":
        w = tl.load(w_ptr + at, mask=inside, other=0.0)
    else:
        if EVEN:
            half, _ = tl.split(tl.reshape(k // 2, [k.shape[0] // 2, 2]))
            bytes = n[:, None].to(tl.int64) * (K // 2) + half[None, :]
            packed = tl.load(w_ptr + bytes, mask=(n[:, None] < N) & (half[None, :] < K // 2), other=0)
            q = tl.reshape(tl.join(packed >> 4, packed & 15), [n.shape[0], k.shape[0]])
        else:
            packed = tl.load(w_ptr + at // 2, mask=inside, other=0)
            q = tl.where(at % 2 == 0, packed >> 4, packed & 15)
        if UNIFORM:
            block = (n.to(tl.int64) * K + tl.min(k, axis=0)) // SIZE
            scale = load_scales(absmax_ptr, nested_ptr, offset_ptr, map_ptr, block, n < N, KIND == "nested")
            scale = scale[:, None]
        else:
            scale = load_scales(
                absmax_ptr, nested_ptr, offset_ptr, map_ptr, at // SIZE, inside, KIND == "nested"
            )
        w = tl.load(codes_ptr + q.to(tl.int32)) * scale
    return w


@triton.jit
def lora_linear_kernel(
    x_ptr, w_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codes_ptr, u_ptr, low_ptr, y_ptr,
    M, N, K, R, scaling,
    BACKWARD: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, EVEN: tl.constexpr, UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile (BLOCK_M, BLOCK_N) of y = x W^T + scaling u B^T or, (BLOCK_M, BLOCK_K), of grad W + scaling v A.

    Going backward, x is grad (M, N), u is v (M, R), low is A (R, K) and y is dx (M, K).
    """
    tiles = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // tiles
    row = m[:, None].to(tl.int64)
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    dtype = x_ptr.dtype.element_ty
    if BACKWARD:
        k += first * BLOCK_K
        out, width = k, K
        acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    else:
        n += first * BLOCK_N
        out, width = n, N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        u = tl.load(u_ptr + row * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        where = r[:, None] * K + k[None, :] if BACKWARD else n[None, :] * R + r[:, None]
        low = tl.load(low_ptr + where, mask=(r[:, None] < R) & (out[None, :] < width), other=0.0)
        acc = tl.dot(u, low, acc, input_precision=PRECISION)
    acc *= scaling
    if BACKWARD:
        for n0 in range(0, N, BLOCK_N):
            x = tl.load(
                x_ptr + row * N + (n0 + n)[None, :],
                mask=(m[:, None] < M) & ((n0 + n)[None, :] < N),
                other=0.0,
            )
            w = weight_tile(
                w_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codes_ptr, n0 + n, k, N, K,
                KIND, SIZE, EVEN, UNIFORM,
            )  # fmt: skip
            acc = tl.dot(x, w.to(dtype), acc, input_precision=PRECISION)
    else:
        for k0 in range(0, K, BLOCK_K):
            x = tl.load(
                x_ptr + row * K + (k0 + k)[None, :],
                mask=(m[:, None] < M) & ((k0 + k)[None, :] < K),
                other=0.0,
            )
            w = weight_tile(
                w_ptr, absmax_ptr, nested_ptr, offset_ptr, map_ptr, codes_ptr, n, k0 + k, N, K,
                KIND, SIZE, EVEN, UNIFORM,
            )  # fmt: skip
            acc = tl.dot(x, tl.trans(w.to(dtype)), acc, input_precision=PRECISION)
    mask = (m[:, None] < M) & (out[None, :] < width)
    tl.store(y_ptr + row * width + out[None, :], acc.to(dtype), mask=mask)


# (bytes per element, backward) -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), proven by
# ``benchmarks static``. BLOCK_K is at most the usual block of a scale.
CONFIGS = {
    (2, False): (128, 128, 64, 8, 2), (2, True): (128, 64, 64, 8, 2),
    (4, False): (64, 64, 32, 8, 2), (4, True): (64, 32, 64, 8, 2),
}  # fmt: skip
# Here sums of 128 columns leave too few registers to dequantize in.
NARROW = {(2, False): (128, 64, 64, 8, 2)}
BY_ARCHITECTURE = {"sm_80": NARROW, "sm_86": NARROW, "sm_89": NARROW}


def tile_config(device: torch.device, itemsize: int, backward: bool) -> tuple[int, int, int, int, int]:
    """The entry of ``CONFIGS`` for a device."""
    return (CONFIGS | BY_ARCHITECTURE.get(configured_architecture(device), {}))[itemsize, backward]


def _launch(
    x: Tensor, weight: Tensor, state: Sequence[Tensor], block_size: int, u: Tensor, low: Tensor,
    shape: tuple[int, int], scaling: float, backward: bool,
) -> Tensor:  # fmt: skip
    """y (M, N) or, backward, dx (M, K), of contiguous arguments; ``shape`` is that of the weight."""
    n, k = shape
    y = x.new_empty(x.shape[0], k if backward else n)
    block_m, block_n, block_k, warps, stages = tile_config(x.device, x.itemsize, backward)
    quantized = weight.dtype == torch.uint8
    if quantized:
        check_state(weight, state, block_size, n * k, "lora_linear")
    elif weight.shape != shape:
        raise ValueError(f"lora_linear: weight is {tuple(weight.shape)}; it must be {shape}.")
    if not y.numel():
        return y
    columns = triton.cdiv(k, block_k) if backward else triton.cdiv(n, block_n)
    plain = x.itemsize == 2 or architecture(x.device).startswith("gfx")
    lora_linear_kernel[(triton.cdiv(x.shape[0], block_m) * columns,)](
        x, weight, *scale_arguments(state if quantized else [u]), codes_on(x.device), u, low, y,
        x.shape[0], n, k, u.shape[1], scaling,
        BACKWARD=backward, KIND=("nested" if len(state) > 1 else "nf4") if quantized else "dense",
        SIZE=block_size, EVEN=k % 2 == 0, UNIFORM=k % block_k == 0 and block_size % block_k == 0,
        PRECISION="ieee" if plain else "tf32x3", BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_R=16 if x.itemsize == 2 or u.shape[1] <= 16 else 32, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _rows(t: Tensor) -> Tensor:
    """(..., C) as (rows, C), contiguous."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1]).contiguous()


@register_cuda("lora_linear_forward", x="*S K", a="R K", b="N R")
def launch_lora_linear_forward(
    x: Tensor, weight: Tensor, state: Sequence[Tensor], block_size: int, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::lora_linear_forward``; u is a product of cuBLAS."""
    rows = _rows(x)
    u, shape = rows @ a.T, (b.shape[0], a.shape[1])
    y = _launch(rows, weight.contiguous(), state, block_size, u, b.contiguous(), shape, scaling, False)
    return y.view(*x.shape[:-1], b.shape[0]), u


@register_cuda("lora_linear_backward", grad="*S N", x="*S K", u="M R", a="R K", b="N R")
def launch_lora_linear_backward(
    grad: Tensor, x: Tensor, u: Tensor, weight: Tensor, state: Sequence[Tensor], block_size: int, a: Tensor,
    b: Tensor, scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Triton launch of ``tapelm::lora_linear_backward``; only dx touches the weight."""
    g, rows, shape = _rows(grad), _rows(x), (b.shape[0], a.shape[1])
    v = g @ b
    dx = _launch(g, weight.contiguous(), state, block_size, v, a.contiguous(), shape, scaling, True)
    return dx.view(x.shape), (v.T @ rows).mul_(scaling), (g.T @ u).mul_(scaling)


@register_fake("lora_linear_forward")
def _(
    x: Tensor, weight: Tensor, state: Sequence[Tensor], block_size: int, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(math.prod(x.shape[:-1]), a.shape[0])


@register_fake("lora_linear_backward")
def _(
    grad: Tensor, x: Tensor, u: Tensor, weight: Tensor, state: Sequence[Tensor], block_size: int, a: Tensor,
    b: Tensor, scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


@register_flop_formula(torch.ops.tapelm.lora_linear_forward)
def _(
    x_shape: Any, weight_shape: Any, state: Any, block_size: int, a_shape: Any, b_shape: Any, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    (rank, k), n = a_shape, b_shape[0]
    return 2 * math.prod(x_shape[:-1]) * (n * k + rank * (n + k))


@register_flop_formula(torch.ops.tapelm.lora_linear_backward)
def _(
    grad_shape: Any, x_shape: Any, u_shape: Any, weight_shape: Any, state: Any, block_size: int, a_shape: Any,
    b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    (rank, k), n = a_shape, b_shape[0]
    return 2 * math.prod(x_shape[:-1]) * (n * k + 2 * rank * (n + k))


def lora_linear(x: Tensor, weight: Tensor | NF4Weight, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``x @ weight.T + scaling * (x @ a.T) @ b.T``.

    Args:
        x: (..., K); float32 or bfloat16, on CUDA also float16.
        weight: (N, K), frozen: a tensor of x's dtype, or an NF4Weight of any, dequantized to that of x.
        a, b: (R, K) and (N, R), dtype of x. Under autocast all tensors are cast to its dtype.
        scaling: LoRA's alpha / R.

    Returns:
        (..., N), contiguous, dtype of x; gradients reach x, a and b.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: shapes that do not match, or devices that differ.
    """
    if isinstance(weight, NF4Weight):
        packed, state, block_size = weight.packed, weight.state, weight.block_size
        x, a, b = autocast(x, a, b)
        check_tensors("lora_linear", x=x, a=a, b=b)
    else:
        check_is_tensor("lora_linear", "weight", weight)
        packed, state, block_size = weight.detach(), [], 64
        x, packed, a, b = autocast(x, packed, a, b)
        check_tensors("lora_linear", x=x, weight=packed, a=a, b=b)
    if len(weight.shape) != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"lora_linear: weight is {tuple(weight.shape)}; x {tuple(x.shape)} needs (N, K), K its last size."
        )
    n, k = weight.shape
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(f"lora_linear: a is {tuple(a.shape)}; weight {(n, k)} needs (R, {k}).")
    if b.shape != (n, a.shape[0]):
        raise ValueError(f"lora_linear: b is {tuple(b.shape)}; it must be {(n, a.shape[0])}.")
    if packed.device != x.device:
        raise ValueError(f"lora_linear: weight is on {packed.device} but x is on {x.device}.")
    return torch.ops.tapelm.lora_linear_forward(x, packed, state, block_size, a, b, float(scaling))[0]

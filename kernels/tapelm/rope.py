"""Rotary position embedding of queries and keys, in the rotate-half layout of Llama.

With a head's D elements cut in halves, x = (x1, x2), and cos, sin likewise:

    y1 = x1 * cos1 - x2 * sin1            dx1 = g1 * cos1 + g2 * sin2
    y2 = x2 * cos2 + x1 * sin2            dx2 = g2 * cos2 - g1 * sin1

The backward is the transposed map, for equal halves the rotation by the opposite angle
[Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021].

Shapes: q (B, Hq, T, D), k (B, Hkv, T, D) of one dtype, D even; cos, sin (T, D) or (B, T, D). Arithmetic is in
float32. q and k may have any strides with the D elements of a head side by side, as the views of a fused
projection do; other layouts are copied first.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import check_is_tensor, check_tensors, next_power_of_2, register_cuda, register_fake
from ._tuning import choose


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, any dtype; as in transformers' Llama."""
    cos, sin = (t.unsqueeze(-3).to(q.dtype) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-x2, x1), dim=-1) * sin

    return rotate(q), rotate(k)


@triton.jit
def _rotate(
    x_ptr, x_strides, y_ptr, batch, t, heads, time, cos1, cos2, sin1, sin2,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All heads of one position, BLOCK_H at a time; y is contiguous."""
    col = tl.arange(0, BLOCK_D)
    for first in range(0, heads, BLOCK_H):
        head = (first + tl.arange(0, BLOCK_H)).to(tl.int64)
        inside = (head[:, None] < heads) & (col[None, :] < HALF)
        at = batch * x_strides[0] + head[:, None] * x_strides[1] + t * x_strides[2] + col[None, :]
        x1 = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
        at = ((batch * heads + head[:, None]) * time + t) * (2 * HALF) + col[None, :]
        tl.store(y_ptr + at, (x1 * cos1 - x2 * sin1).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + at + HALF, (x2 * cos2 + x1 * sin2).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    q_ptr, q_strides, k_ptr, k_strides, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_heads, k_heads, time,
    table_stride, INVERSE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One position per program: its cos and sin are read once for all heads of q and k.
    batch = (tl.program_id(0) // time).to(tl.int64)
    t = (tl.program_id(0) % time).to(tl.int64)
    # Loaded for each row of the tile: every thread gets the 16 bytes that it needs, most from L1.
    col = tl.broadcast_to(tl.arange(0, BLOCK_D)[None, :], [BLOCK_H, BLOCK_D])
    at = batch * table_stride + t * (2 * HALF) + col
    cos1 = tl.load(cos_ptr + at, mask=col < HALF, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + at + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + at, mask=col < HALF, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + at + HALF, mask=col < HALF, other=0.0).to(tl.float32)
    if INVERSE:
        sin1, sin2 = -sin2, -sin1
    _rotate(
        q_ptr, q_strides, q_out_ptr, batch, t, q_heads, time, cos1, cos2, sin1, sin2, HALF, BLOCK_H, BLOCK_D
    )
    _rotate(
        k_ptr, k_strides, k_out_ptr, batch, t, k_heads, time, cos1, cos2, sin1, sin2, HALF, BLOCK_H, BLOCK_D
    )


def launch_config(q: Tensor) -> dict[str, int]:
    """Tile of heads and half their width; 8 elements of each half per thread."""
    half = q.shape[3] // 2
    block = max(16, next_power_of_2(half))
    tile = choose("rope", q.device, (q.itemsize, block), {"BLOCK_H": max(1, 512 // block), "num_warps": 2})
    return {"HALF": half, "BLOCK_D": block, **tile}


@register_cuda("rope", q="B Hq T D", k="B Hkv T D", cos="T D | B T D", sin="T D | B T D")
def launch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::rope``."""
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    outputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    batch, _, time, width = q.shape
    if batch * time * width:
        rope_kernel[(batch * time,)](
            q, q.stride()[:3], k, k.stride()[:3], cos, sin, *outputs, q.shape[1], k.shape[1], time,
            cos.stride(0) if cos.dim() == 3 else 0, INVERSE=inverse, **launch_config(q),
        )  # fmt: skip
    return outputs[0], outputs[1]


@register_fake("rope")
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by the angles of their positions.

    Args:
        q, k: (B, Hq, T, D) and (B, Hkv, T, D), D even; float32 or bfloat16, on CUDA also float16. Views of a
            fused projection are read where they lie.
        cos, sin: (T, D) or (B, T, D), dtype of q or float32; they get no gradient. In Llama both halves of
            the last dimension hold the same D / 2 angles.

    Returns:
        (q, k) rotated, contiguous, of the same shapes and dtype.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: wrong shapes, devices that differ, or cos or sin requires a gradient.
    """
    check_tensors("rope", q=q, k=k)
    if q.dim() != 4 or q.shape[-1] % 2:
        raise ValueError(f"rope: q is {tuple(q.shape)}; it must be (B, H, T, D) with an even D.")
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"rope: k is {tuple(k.shape)}; it must equal q {tuple(q.shape)} but for the number of heads."
        )
    batch, _, time, width = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check_is_tensor("rope", name, table)
        if tuple(table.shape) not in ((time, width), (batch, time, width)) or table.shape != cos.shape:
            raise ValueError(
                f"rope: {name} is {tuple(table.shape)}; both tables must be ({time}, {width}) or "
                f"({batch}, {time}, {width})."
            )
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"rope: {name} is {table.dtype}; use {q.dtype} or float32.")
        if table.device != q.device:
            raise ValueError(f"rope: {name} is on {table.device} but q is on {q.device}.")
        if table.requires_grad:
            raise ValueError(f"rope: {name} requires a gradient, which is not computed; detach it.")
    return torch.ops.tapelm.rope.default(q, k, cos, sin, False)

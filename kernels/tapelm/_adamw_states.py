"""Moments of AdamW in 8 bits, in plain PyTorch: the definition of the code, and conversion of saved states.

A block of 256 elements has a float32 scale, its largest magnitude. An element is a tiny float relative to it:
code c > 0 is the float32 with the bits (c + bias) << 20, that is 3 bits of mantissa or 8 steps an octave, and
the largest code is 1. The first moment has a sign and 16 octaves, the second, never negative, 32. This is
block-wise quantisation [Dettmers et al., "8-bit optimizers via block-wise quantization", 2022] with a code
that needs no table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._adamw_kernels import QUANT
from ._sharded import as_shard, shard_of

QUANT_BLOCK = QUANT.value
SMALLEST_QUANTIZED = 4096
"""Tensors of fewer elements, biases and norms, keep float32 moments: they cost little."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Names in the optimizer's state, and whether they have a sign."""
_SMALLEST_NORMAL = 2.0**-126


def _largest(signed: bool) -> int:
    return 127 if signed else 255


def quantize(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of x's shape, uint8, and scales (blocks,).

    Without ``random`` to nearest; with 16-bit integers for each element up with the probability of what is
    cut. A second moment above 0 never becomes 0, which would make the update huge. An inf or NaN makes its
    block inf or NaN.
    """
    blocks = -(-x.numel() // QUANT_BLOCK)
    flat = x.new_zeros(blocks * QUANT_BLOCK, dtype=torch.float32)
    flat[: x.numel()] = x.flatten()
    magnitude = flat.abs().view(blocks, QUANT_BLOCK)
    scale = magnitude.amax(dim=1).clamp(min=_SMALLEST_NORMAL)
    bits = (magnitude * (1.0 / scale)[:, None]).view(torch.int32) & 0x7FFFFFFF
    added = torch.zeros_like(bits) + 0x80000
    if random is not None:
        added.view(-1)[: x.numel()] = random.flatten().to(torch.int32) << 4
    # In int64, as a NaN plus something may need 32 bits.
    code = ((bits.long() + added) >> 20) - (1016 - _largest(signed))
    code = torch.where(magnitude == 0, 0, code.clamp(0 if signed else 1, _largest(signed)))
    if signed:
        code += 128 * flat.signbit().view_as(code)
    return code.to(torch.uint8).view(-1)[: x.numel()].view(x.shape), scale


def dequantize(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The float32 values of ``quantize``'s results."""
    magnitude = codes.flatten().int() & _largest(signed)
    value = ((magnitude + (1016 - _largest(signed))) << 20).view(torch.float32)
    value = torch.where(magnitude == 0, 0.0, value)
    value *= scale.repeat_interleave(QUANT_BLOCK)[: codes.numel()]
    if signed:
        value = torch.where(codes.flatten() >= 128, -value, value)
    return value.view(codes.shape)


def new_state(p: Tensor, eight_bits: bool, master: bool) -> dict[str, Any]:
    """Zero moments for ``p`` and, where asked for, its float32 master; on a CPU on huge pages."""
    state: dict[str, Any] = {"step": 0}
    part = shard_of(p)
    for name in MOMENTS:
        moment = torch.ops.tapelm.adamw_state(part, torch.uint8 if eight_bits else torch.float32)
        state[name] = as_shard(moment, p)
        if eight_bits:
            blocks = -(-p.numel() // QUANT_BLOCK)
            state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)
    if master:
        state["master"] = as_shard(torch.ops.tapelm.adamw_state(part, torch.float32).copy_(part), p)
    return state


def converted_state(saved: dict[str, Any], p: Tensor, eight_bits: bool, master: bool) -> dict[str, Any]:
    """A copy of ``saved``, of this optimizer or of ``torch.optim.AdamW``, in the format asked for.

    Moments of the same format are copied exactly; others are dequantized, or quantized to nearest. A master
    that was not saved is made from the parameter; one that is not wanted is dropped.
    """
    state = new_state(p, eight_bits, master)
    state["step"] = int(saved["step"])
    for name, signed in MOMENTS.items():
        moment, scale = saved[name], saved.get(f"{name}_scale")
        if eight_bits:
            if scale is None:
                moment, scale = quantize(moment.float(), signed)
            state[f"{name}_scale"].copy_(scale)
        elif scale is not None:
            moment = dequantize(moment, scale, signed)
        state[name].copy_(moment)
    if master and "master" in saved:
        state["master"].copy_(saved["master"])
    return state

"""NF4: weights as 4-bit indices into quantiles of a normal distribution, one scale per block.

    absmax_j = max |w_i| of block j        q_i = index of the code nearest to w_i / absmax_j
    w'_i = code[q_i] * absmax_j            block j: elements j * block_size ... of w, flattened

With double quantization the scales are stored in 8 bits as well, in blocks of 256:

    s_j = absmax_j - mean(absmax)          absmax'_j = map[p_j] * (max |s| of its block) + mean(absmax)

[Dettmers et al., "QLoRA", 2023; map: Dettmers et al., "8-bit optimizers via block-wise quantization", 2022].
Bytes and scales are those of bitsandbytes' CPU library, which rounds s_j / max |s| to a grid of 65536 values
before it looks for the nearest one of the map. In a last block that is not whole the CPU kernel divides by
the scale, as that library does; the Triton kernel multiplies with its reciprocal as in all other blocks,
which is a rounding apart. The Triton kernels are in _nf4_kernels.py.

Shapes: w (...) of n elements; packed (ceil(n / 2), 1) uint8, element 2 i in the high nibble; absmax
(ceil(n / block_size),) float32, or uint8 p; nested_absmax (ceil(len(absmax) / 256),), offset () and map
(256,) float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._library import check_tensors, register_cuda, register_fake
from ._nf4_kernels import CODES, NESTED_BLOCK, check_block_size, launch_dequantize, launch_quantize


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A quantized weight; it has no gradient."""

    packed: Tensor
    absmax: Tensor
    """float32, or uint8 with the three tensors below."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the weight that was quantized and of what ``nf4_dequantize`` returns."""
    block_size: int = 64
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None
    map: Tensor | None = None

    @property
    def state(self) -> list[Tensor]:
        """What belongs to ``packed`` in the signatures of the ops."""
        nested = (self.nested_absmax, self.offset, self.map)
        return [self.absmax, *(tensor for tensor in nested if tensor is not None)]

    def to(self, device: torch.device | str) -> NF4Weight:
        packed, *state = (tensor.to(device) for tensor in (self.packed, *self.state))
        return NF4Weight(packed, state[0], self.shape, self.dtype, self.block_size, *state[1:])

    def as_dict(self) -> dict[str, Tensor]:
        """What bitsandbytes' ``QuantState.as_dict(packed=True)`` holds, to be saved beside ``packed``."""
        described: dict[str, Any] = {
            "quant_type": "nf4", "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape),
        }  # fmt: skip
        tensors = {"absmax": self.absmax, "quant_map": torch.tensor(CODES, device=self.absmax.device)}
        if self.nested_absmax is not None and self.offset is not None and self.map is not None:
            tensors |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.map}
            described |= {
                "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }  # fmt: skip
        text = json.dumps(described).encode()
        return {**tensors, "quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8)}

    @classmethod
    def from_dict(cls, packed: Tensor, entries: Mapping[str, Tensor]) -> NF4Weight:
        """The inverse of ``as_dict``; names may have a prefix that ends in a dot, as in a checkpoint.

        Raises:
            ValueError: entries are missing, or are of another type than NF4 with nested blocks of 256.
        """
        found = {name.split("quant_state.")[-1].split(".")[-1]: value for name, value in entries.items()}
        if "bitsandbytes__nf4" not in found or "absmax" not in found:
            raise ValueError(
                f"NF4Weight: {sorted(entries)} have no absmax and quant_state.bitsandbytes__nf4."
            )
        described = json.loads(bytes(found["bitsandbytes__nf4"].cpu().tolist()))
        codes = torch.tensor(CODES)
        if "quant_map" in found and not torch.equal(found["quant_map"].cpu().float(), codes):
            raise ValueError("NF4Weight: quant_map holds other codes than those of NF4.")
        device, nested = packed.device, ()
        if "nested_offset" in described:
            if described["nested_blocksize"] != NESTED_BLOCK:
                raise ValueError(
                    f"NF4Weight: nested_blocksize must be 256, not {described['nested_blocksize']}."
                )
            offset = torch.tensor(described["nested_offset"], dtype=torch.float32, device=device)
            nested = found["nested_absmax"].to(device), offset, found["nested_quant_map"].to(device)
        shape, dtype = tuple(described["shape"]), getattr(torch, described["dtype"])
        return cls(packed, found["absmax"].to(device), shape, dtype, described["blocksize"], *nested)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 values in [-1, 1] of the scales: seven decades with 1, 2, 4 ... 64 values each, 0, 1, signs."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        positive = 10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [positive, -positive]
    return torch.cat(values).sort().values.to(device)


def nf4_quantize_reference(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """The definition in plain PyTorch."""
    codes, flat = torch.tensor(CODES, device=w.device), w.detach().float().flatten()
    whole = flat.numel() // block_size * block_size
    absmax = flat[:whole].view(-1, block_size).abs().amax(1)
    scaled = flat[:whole].view(-1, block_size) * (1.0 / absmax.clamp(min=1e-38))[:, None]
    if whole < flat.numel():
        last = flat[whole:].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled.flatten(), flat[whole:] / last])
    q = torch.bucketize(scaled.flatten(), (codes[:-1] + codes[1:]) / 2)
    q = torch.nn.functional.pad(q, (0, q.numel() % 2), value=7).to(torch.uint8)
    packed = (q[::2] << 4 | q[1::2])[:, None]
    if not double_quant:
        return NF4Weight(packed, absmax, tuple(w.shape), w.dtype, block_size)
    values, offset = dynamic_map(w.device), absmax.mean() if absmax.numel() else absmax.new_zeros(())
    parts = (absmax - offset).split(NESTED_BLOCK) if absmax.numel() else ()
    nested = torch.stack([part.abs().max() for part in parts]) if parts else absmax.new_zeros(0)
    grid = [(((part * (1.0 / top) + 1.0) * 0.5) * 65535.0 + 0.5).nan_to_num(0.0).floor()
            for part, top in zip(parts, nested, strict=True)]  # fmt: skip
    near = -1.0 + 2.0 * torch.cat(grid or [absmax]) / 65535.0
    absmax = torch.bucketize(near, 0.5 * (values[:-1] + values[1:])).to(torch.uint8)
    return NF4Weight(packed, absmax, tuple(w.shape), w.dtype, block_size, nested, offset, values)


def nf4_dequantize_reference(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The definition in plain PyTorch, in float32 or, when ``dtype`` is float64, in float64."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    nibbles = torch.cat([q.packed >> 4, q.packed & 15], dim=1).flatten()[: math.prod(q.shape)].int()
    absmax = q.absmax.to(kind)
    if q.nested_absmax is not None and q.offset is not None and q.map is not None:
        scales = q.nested_absmax.to(kind).repeat_interleave(NESTED_BLOCK)[: absmax.numel()]
        absmax = q.map.to(kind)[q.absmax.int()] * scales + q.offset
    scales = absmax.repeat_interleave(q.block_size)[: nibbles.numel()]
    codes = torch.tensor(CODES, dtype=torch.float32, device=nibbles.device).to(kind)
    return (codes[nibbles] * scales).view(q.shape).to(dtype or q.dtype)


register_cuda("nf4_quantize", map="256")(launch_quantize)
register_cuda("nf4_dequantize")(launch_dequantize)


@register_fake("nf4_quantize")
def _(w: Tensor, block_size: int, map: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks, nested = -(-w.numel() // block_size), map is not None
    return (
        w.new_empty((w.numel() + 1) // 2, 1, dtype=torch.uint8),
        w.new_empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        w.new_empty(-(-blocks // NESTED_BLOCK) if nested else 0, dtype=torch.float32),
        w.new_empty(() if nested else 0, dtype=torch.float32),
    )


@register_fake("nf4_dequantize")
def _(
    packed: Tensor, state: Sequence[Tensor], block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def nf4_quantize(w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantizes a weight to 4 bits an element.

    Args:
        w: (...); float32 or bfloat16, on CUDA also float16. Not differentiated.
        block_size: elements per scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits, in blocks of 256: 4.13 instead of 4.5 bits an element.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unsupported device or block_size.
    """
    check_tensors("nf4_quantize", w=w)
    check_block_size("nf4_quantize", block_size)
    values = dynamic_map(w.device) if double_quant else None
    packed, absmax, nested, offset = torch.ops.tapelm.nf4_quantize(w.detach(), block_size, values)
    shape = tuple(w.shape)
    if values is None:
        return NF4Weight(packed, absmax, shape, w.dtype, block_size)
    return NF4Weight(packed, absmax, shape, w.dtype, block_size, nested, offset, values)


def nf4_dequantize(q: NF4Weight) -> Tensor:
    """The weight of ``q.shape`` and ``q.dtype`` that ``q`` stands for.

    Raises:
        TypeError, ValueError: parts of ``q`` that do not fit each other.
    """
    if not isinstance(q, NF4Weight):
        raise TypeError(f"nf4_dequantize: q is of type {type(q).__name__}; it must be an NF4Weight.")
    return torch.ops.tapelm.nf4_dequantize(q.packed, q.state, q.block_size, q.shape, q.dtype)

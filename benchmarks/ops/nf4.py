"""NF4 quantization and back, both with quantized scales, against bitsandbytes where installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tapelm
from benchmarks.harness import Case, close
from gpt import extras
from tapelm.nf4 import nf4_dequantize_reference, nf4_quantize_reference

SHAPES = ((2048, 2048), (8192, 2048))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for case in (quantize_case, dequantize_case)
    ]


def bytes_moved(elements: int, itemsize: int) -> float:
    """The weight, half a byte an element and a byte for each block of 64."""
    return elements * (itemsize + 0.5 + 1 / 64)


def equal_bytes(device: torch.device) -> Callable[[Any, Any], None]:
    """Of packed codes: to the bit on a CPU, where bitsandbytes' library is the model.

    Its CUDA kernels divide and compare in another order, and what lies within a rounding of the middle
    between two codes, one weight in some hundred thousand, may go to either of them.
    """
    if device.type == "cpu":
        return close(0.0, 0.0)

    def agree(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for a, b in zip(ours, expected, strict=True):
            high, low = (a >> 4).int() - (b >> 4).int(), (a & 15).int() - (b & 15).int()
            differing = float((a != b).float().mean())
            assert int(torch.maximum(high.abs(), low.abs()).max()) <= 1, "codes that are no neighbours"
            assert differing < 1e-3, f"{differing:.1%} of the bytes differ"

    return agree


def equal_weights(device: torch.device, dtype: torch.dtype) -> Callable[[Any, Any], None]:
    """Of the same bytes: to the bit on a CPU; a GPU may contract the scale's product and sum, which is a
    rounding in float32 and can become one in `dtype`."""
    return close(0.0 if device.type == "cpu" else 2.0**-16 if dtype == torch.float32 else 2.0**-7, 0.0)


def _bitsandbytes() -> Any:
    extras.quiet_bitsandbytes()
    found = importlib.util.find_spec("bitsandbytes")
    return importlib.import_module("bitsandbytes.functional") if found else None


def quantize_case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    w, peer = (torch.randn(shape, device=device) * 0.02).to(dtype), _bitsandbytes()
    variants: dict[str, Callable[[], Any]] = {"torch": lambda: nf4_quantize_reference(w).packed[None]}
    if peer is not None:
        options = {"quant_type": "nf4", "compress_statistics": True}
        variants["bitsandbytes"] = lambda: peer.quantize_4bit(w, **options)[0][None]
    variants["tapelm"] = lambda: tapelm.nf4_quantize(w).packed[None]
    return Case(
        subject="nf4 quantize",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants=variants,
        bound="copy",
        work=bytes_moved(w.numel(), w.itemsize),
        agree=equal_bytes(device),
    )


def dequantize_case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    w, peer = (torch.randn(shape, device=device) * 0.02).to(dtype), _bitsandbytes()
    q = tapelm.nf4_quantize(w)
    variants: dict[str, Callable[[], Any]] = {"torch": lambda: nf4_dequantize_reference(q)[None]}
    if peer is not None:
        state = peer.QuantState.from_dict(q.as_dict(), device)
        variants["bitsandbytes"] = lambda: peer.dequantize_4bit(q.packed, state)[None]
    variants["tapelm"] = lambda: tapelm.nf4_dequantize(q)[None]
    return Case(
        subject="nf4 dequantize",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants=variants,
        bound="copy",
        work=bytes_moved(w.numel(), w.itemsize),
        agree=equal_weights(device, dtype),
    )

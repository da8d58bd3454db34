"""The least work each op needs, the work its tiles issue, and the time a device needs for it at its ceilings.

minimum    every tensor argument read once, every result written once; flops from the formulas that the ops
           register with torch.utils.flop_counter
*_tiles    bytes and flops that the Triton kernels issue: keys are read once per block of queries, and tiles
           on the diagonal are multiplied whole
seconds    max(bytes / bandwidth, flops / matrix rate)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ._library import architecture


@dataclass(frozen=True)
class Work:
    """Bytes moved to and from memory, and flops of matrix products (2 per multiply-add)."""

    bytes: int
    flops: int

    def seconds(self, device: Device, dtype: torch.dtype) -> float:
        """The time at the ceilings of ``device``, bytes and flops overlapping perfectly."""
        rate = device.float32_flops if dtype == torch.float32 else device.half_flops
        return max(self.bytes / device.bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Device:
    """Datasheet ceilings: bytes per second; dense flops per second in half precision and in TensorFloat-32.

    On AMD the float32 figure is that of the float32 matrix instructions. ``memory`` is in bytes, without end
    where nothing says how much there is.
    """

    name: str
    bandwidth: float
    half_flops: float
    float32_flops: float
    memory: float = math.inf


# The device that each compilation target stands for.
DEVICES = {
    "sm_80": Device("A100 SXM 80GB", 2.039e12, 312e12, 156e12, 80e9),
    "sm_86": Device("A10G", 0.600e12, 70e12, 35e12, 24e9),
    "sm_89": Device("L40S", 0.864e12, 362e12, 183e12, 48e9),
    "sm_90": Device("H100 SXM", 3.35e12, 989e12, 495e12, 80e9),
    "sm_100": Device("B200", 8.0e12, 2250e12, 1100e12, 180e9),
    "gfx942": Device("MI300X", 5.3e12, 1307e12, 163e12, 192e9),
}

# Where products of one architecture differ; the first pattern that a GPU's name has is its own.
PRODUCTS = (
    ("A100.*PCI.*40GB", Device("A100 PCIe 40GB", 1.555e12, 312e12, 156e12, 40e9)),
    ("A100.*SXM.*40GB", Device("A100 SXM 40GB", 1.555e12, 312e12, 156e12, 40e9)),
    ("A100.*80GB PCI", Device("A100 PCIe 80GB", 1.935e12, 312e12, 156e12, 80e9)),
    ("A100.*SXM.*80GB", DEVICES["sm_80"]),
    ("A10G", DEVICES["sm_86"]),
    ("L40S", DEVICES["sm_89"]),
    (r"\bH100 PCIe", Device("H100 PCIe", 2.0e12, 756e12, 378e12, 80e9)),
    (r"\bH100 NVL", Device("H100 NVL", 3.9e12, 835e12, 418e12, 94e9)),
    (r"\bH100.*(SXM|80GB HBM3)", DEVICES["sm_90"]),
    (r"\bH200 NVL", Device("H200 NVL", 4.8e12, 836e12, 418e12, 141e9)),
    (r"\bH200\b", Device("H200 SXM", 4.8e12, 989e12, 495e12, 141e9)),
    (r"\bB200\b", DEVICES["sm_100"]),
    ("MI300X", DEVICES["gfx942"]),
)


def datasheet(device: torch.device) -> Device | None:
    """The ceilings of a GPU by its name, None for one that is not known; outside a GPU those of the assumed
    architecture."""
    if device.type != "cuda":
        return DEVICES.get(architecture(device))
    name = torch.cuda.get_device_name(device)  # "NVIDIA H100 80GB HBM3"
    return next((product for pattern, product in PRODUCTS if re.search(pattern, name)), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _size(values: Any) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in _tensors(values))


def minimum(name: str, *arguments: Any) -> Work:
    """The least work of ``tapelm::name`` on these arguments, of which only shapes and dtypes matter."""
    if name == "adamw_step_":
        params, grads, exp_avg, exp_avg_sq, masters, *scales = arguments[:7]
        # With a master the parameter itself is only written.
        moments = _size([exp_avg, exp_avg_sq, *scales])
        return Work(_size([grads, masters or params, params, masters]) + 2 * moments, 0)
    shapes = [_on_meta(argument) for argument in arguments]
    op = getattr(torch.ops.tapelm, name)
    results = op(*shapes)
    formula = flop_registry.get(op)
    return Work(
        _size(shapes) + _size(results), formula(*shapes, out_val=results) if formula is not None else 0
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [_on_meta(each) for each in value] if isinstance(value, list) else value


def _tiles(time: int, keys: int, block: int, other: int, causal: bool) -> int:
    """Tiles of ``other`` keys that all blocks of ``block`` queries visit together."""
    visited = 0
    for first in range(0, time, block):
        visited += math.ceil((min(first + block + keys - time, keys) if causal else keys) / other)
    return visited


def attention_forward_tiles(
    q: Tensor, k: Tensor, causal: bool, block_m: int, block_n: int, block_d: int
) -> Work:
    """Issued by the forward kernel, without dropout or documents, when blocks divide T and S.

    Every block of queries reads q once, and k and v up to its diagonal; it writes out and lse.
    """
    batch, heads, time, width = q.shape
    tiles = batch * heads * _tiles(time, k.shape[2], block_m, block_n, causal)
    keys = 2 * tiles * block_n * width * k.itemsize
    return Work(
        keys + 2 * q.numel() * q.itemsize + q.numel() // width * 4, 4 * tiles * block_m * block_n * block_d
    )


def attention_decode_tiles(
    q: Tensor, k: Tensor, parts: int, block_m: int, block_n: int, block_d: int
) -> Work:
    """Issued by the two decoding kernels, without documents, where keys are cut into ``parts``.

    Every key and value is read once, q once for each part; out and lse are written. Of several parts each
    writes D sums, a total and a top of every query in float32, which are read once to merge them.
    """
    batch, heads, time, width = q.shape
    queries, groups = batch * heads * time, batch * k.shape[1]
    found = parts * queries * (width + 2) * 4 if parts > 1 else 0
    moved = 2 * k.numel() * k.itemsize + (parts + 1) * q.numel() * q.itemsize + queries * 4 + 2 * found
    return Work(moved, 4 * groups * math.ceil(k.shape[2] / block_n) * block_m * block_n * block_d)


def cross_entropy_rows(rows: int, vocabulary: int, itemsize: int, need_grad: bool) -> int:
    """Bytes the cross-entropy kernel issues: logits once for the sum and once more for the gradient, which
    replaces them; target (8), its logit, the count of valid rows (8) and the loss (4)."""
    logits = vocabulary * itemsize * (3 if need_grad else 1)
    return rows * (logits + 8 + itemsize + 8 + 4)


def attention_backward_tiles(
    q: Tensor, k: Tensor, causal: bool, keys: tuple[int, int], queries: tuple[int, int]
) -> Work:
    """Issued by the three backward kernels, as ``attention_forward_tiles``, when D is a power of two >= 16.

    ``keys`` and ``queries`` are the (BLOCK_M, BLOCK_N) of the kernel that makes dk and dv and of the one that
    makes dq. The former reads k and v once and q, grad, lse and delta of each block of queries from its
    diagonal on, for every query head of the group; it multiplies four times a tile, the latter three times.
    """
    batch, heads, time, width = q.shape
    row, length, item = batch * heads, k.shape[2], q.itemsize
    block_m, block_n = keys
    visited = 0
    for first in range(0, length, block_n):
        start = max(first + time - length, 0) // block_m * block_m if causal else 0
        visited += math.ceil((time - start) / block_m)
    key_tiles = row * visited
    query_tiles = row * _tiles(time, length, *queries, causal)
    delta = 2 * q.numel() * item + row * time * 4
    by_keys = 4 * k.numel() * item + key_tiles * block_m * (2 * width * item + 8)
    by_queries = 3 * q.numel() * item + 8 * row * time + 2 * query_tiles * queries[1] * width * item
    return Work(
        delta + by_keys + by_queries,
        2 * width * (4 * key_tiles * block_m * block_n + 3 * query_tiles * queries[0] * queries[1]),
    )


def lora_linear_tiles(
    sizes: tuple[int, int, int, int], blocks: tuple[int, int, int, int], itemsize: int, backward: bool
) -> Work:
    """Issued by the product with a weight in NF4 with quantized scales, when blocks divide sizes.

    Both are (rows, N, K, R). A tile of the result reads its rows of x (backward: of grad) and of u, its part
    of the other low-rank factor, and its part of the weight: 4 bits and a code of 4 bytes for each element,
    and for each row of a tile of the weight the index of its scale (1), its value (4) and nested scale (4);
    the offset (4) once a tile. Codes, values and nested scales come from the cache.
    """
    rows, n, k, rank = sizes
    block_rows, block_n, block_k, block_rank = blocks
    out, inner, block_out, block_inner = (k, n, block_k, block_n) if backward else (n, k, block_n, block_k)
    tiles, steps = (rows // block_rows) * (out // block_out), inner // block_inner
    weight = block_n * block_k // 2 + 4 * block_n * block_k + 9 * block_n + 4
    low = rank // block_rank * block_rank * (block_rows + block_out) * itemsize
    each = low + steps * (block_rows * block_inner * itemsize + weight) + block_rows * block_out * itemsize
    return Work(tiles * each, 2 * rows * out * (inner + rank))

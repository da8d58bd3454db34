"""Tiles, warps and pipeline stages of the attention kernels, proven by ``benchmarks static``; which operands
they get as tensor descriptors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._library import architecture, configured_architecture, next_power_of_2
from ._tuning import choose

Config = tuple[int, int, int, int]
Configs = dict[tuple[int, int, bool], Config]

# (bytes per element, BLOCK_D, masked) -> (BLOCK_M, BLOCK_N, num_warps, num_stages), the
# largest tiles that do not spill on sm_80 and sm_90. D below 64 uses the tile of 64; without a True entry the
# False one serves both. Other architectures override entries in BY_ARCHITECTURE.
FORWARD = {
    (2, 64, False): (128, 64, 8, 3), (2, 128, False): (128, 64, 8, 3), (2, 256, False): (64, 32, 8, 2),
    (4, 64, False): (64, 32, 8, 2), (4, 128, False): (32, 32, 8, 2), (4, 256, False): (16, 16, 8, 2),
    (2, 128, True): (128, 32, 8, 3), (4, 128, True): (32, 16, 8, 2),
}  # fmt: skip
KEYS = {
    (2, 64, False): (32, 64, 8, 2), (2, 128, False): (32, 64, 8, 2), (2, 256, False): (32, 32, 8, 1),
    (4, 64, False): (32, 16, 4, 2), (4, 128, False): (16, 16, 8, 1), (4, 256, False): (16, 16, 8, 1),
    (2, 128, True): (32, 32, 8, 2),
}  # fmt: skip
QUERIES = {
    (2, 64, False): (64, 64, 8, 2), (2, 128, False): (64, 64, 8, 2), (2, 256, False): (32, 32, 8, 2),
    (4, 64, False): (32, 32, 4, 2), (4, 128, False): (16, 32, 8, 1), (4, 256, False): (32, 16, 8, 1),
}  # fmt: skip

TABLES = {"forward": FORWARD, "keys": KEYS, "queries": QUERIES}
# Grouped queries and dropout need a few registers more than sm_80-89 have.
# AMD's 64-wide warps take twice the registers a program has, and 64 KiB of shared memory no second stage.
BY_ARCHITECTURE: dict[tuple[str, str], Configs] = {
    ("sm_80", "forward"): {(2, 128, False): (128, 64, 8, 2)},
    ("sm_80", "queries"): {(2, 64, True): (64, 32, 8, 2)},
    ("sm_86", "queries"): {(2, 64, True): (64, 32, 8, 2)},
    ("sm_89", "queries"): {(2, 64, True): (64, 32, 8, 2)},
    ("sm_86", "forward"): {(2, 128, False): (128, 64, 8, 2), (2, 128, True): (64, 32, 8, 2)},
    ("sm_89", "forward"): {(2, 128, False): (128, 64, 8, 2), (2, 128, True): (64, 32, 8, 2)},
    # Tiles of 64 keys, the least that these matrix instructions take.
    ("sm_90", "keys"): {(2, 128, True): (32, 64, 8, 1)},
    ("sm_90", "queries"): {(2, 128, True): (64, 32, 8, 2)},
    ("sm_100", "forward"): {(4, 256, True): (16, 16, 8, 3)},
    ("sm_100", "keys"): {(2, 128, False): (64, 64, 8, 1), (2, 128, True): (64, 64, 8, 1)},
    ("sm_100", "queries"): {
        (2, 128, False): (64, 64, 8, 1), (2, 128, True): (64, 64, 8, 2), (2, 256, False): (64, 32, 8, 1),
        (4, 256, True): (32, 16, 16, 1),
    },
    ("gfx942", "forward"): {
        (2, 64, False): (128, 64, 4, 1), (2, 64, True): (128, 32, 4, 1),
        (2, 128, False): (128, 32, 4, 1), (2, 128, True): (64, 32, 4, 1), (2, 256, False): (64, 16, 4, 1),
        (4, 64, False): (64, 32, 4, 1), (4, 128, False): (32, 16, 4, 1), (4, 128, True): (32, 16, 4, 1),
        (4, 256, False): (16, 16, 4, 1),
    },
    ("gfx942", "keys"): {
        (2, 64, False): (32, 64, 4, 1), (2, 128, False): (16, 32, 4, 1), (2, 128, True): (16, 32, 4, 1),
        (2, 256, False): (16, 16, 4, 1),
        (4, 64, False): (16, 32, 4, 1), (4, 128, False): (16, 16, 4, 1), (4, 256, False): (16, 16, 4, 1),
    },
    ("gfx942", "queries"): {
        (2, 64, False): (64, 32, 4, 1), (2, 128, False): (32, 32, 4, 1), (2, 256, False): (16, 16, 4, 1),
        (4, 64, False): (32, 32, 4, 1), (4, 128, False): (16, 16, 4, 1), (4, 256, False): (16, 16, 4, 1),
    },
}  # fmt: skip

# With tensor descriptors addresses take no registers, which leaves room for tiles twice as large.
DESCRIBED: dict[tuple[str, str], Configs] = {
    ("sm_90", "forward"): {
        (2, 128, False): (128, 128, 8, 2), (2, 128, True): (128, 64, 8, 2), (2, 256, False): (128, 64, 8, 2),
        (2, 256, True): (64, 64, 8, 2),
    },
    ("sm_90", "keys"): {
        (2, 64, False): (64, 128, 8, 2), (2, 128, False): (64, 64, 8, 2), (2, 128, True): (64, 64, 8, 2),
        (2, 256, False): (16, 64, 8, 2),
    },
    ("sm_90", "queries"): {
        (2, 64, False): (128, 64, 8, 2), (2, 128, False): (128, 64, 8, 2), (2, 128, True): (128, 64, 8, 2),
        (2, 256, False): (64, 32, 8, 2), (2, 256, True): (64, 16, 8, 3),
    },
    ("sm_100", "forward"): {
        (2, 64, False): (128, 64, 8, 3), (2, 128, False): (128, 128, 8, 2), (2, 128, True): (128, 64, 8, 2),
        (2, 256, False): (128, 64, 8, 2), (2, 256, True): (64, 64, 8, 2),
    },
    ("sm_100", "keys"): {
        (2, 64, False): (64, 128, 8, 2), (2, 128, False): (64, 64, 8, 2), (2, 128, True): (64, 64, 8, 2),
        (2, 256, False): (32, 64, 8, 1), (2, 256, True): (16, 64, 8, 1),
    },
    ("sm_100", "queries"): {
        (2, 64, False): (128, 64, 8, 2), (2, 128, False): (128, 64, 8, 2), (2, 128, True): (128, 64, 8, 3),
        (2, 256, False): (64, 32, 8, 2),
    },
}  # fmt: skip


def launch_config(
    kernel: str, device: torch.device, itemsize: int, width: int, masked: bool, described: bool
) -> dict[str, Any]:
    """Keyword arguments of a launch of ``kernel`` ("forward", "keys", "queries") for heads of ``width``.

    ``masked``: with dropout or document ids; ``described``: with tensor descriptors. Rows that are no
    multiple of 16 bytes take more registers for their addresses and count as masked.
    """
    block_d = max(16, next_power_of_2(width))
    tile = max(64, block_d)
    name = configured_architecture(device)
    configs = TABLES[kernel] | BY_ARCHITECTURE.get((name, kernel), {})
    masked = masked or width * itemsize % 16 != 0
    if described:
        configs |= DESCRIBED.get((name, kernel), {})
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    shipped = configs.get((itemsize, tile, masked), configs[itemsize, tile, False])
    tuned = choose(
        f"attention_{kernel}",
        device,
        (itemsize, tile, masked, described),
        dict(zip(names, shipped, strict=True)),
    )
    # float32 products are three TensorFloat-32 ones; the wide backward has no registers for that and
    # multiplies plainly, as wide decoding does, and AMD, which has float32 matrix instructions.
    plain = itemsize == 2 or name.startswith("gfx") or (tile == 256 and kernel != "forward")
    return {
        "D": width, "BLOCK_D": block_d, "PRECISION": "ieee" if plain else "tf32x3", "DESCRIPTORS": described,
        **tuned,
    }  # fmt: skip


# Of attention_decode_kernel: (bytes per element, BLOCK_D, BLOCK_M) -> (BLOCK_N, num_warps, num_stages). Tiles
# of which a multiprocessor holds DECODE_WARPS warps, so that some load while others multiply.
DECODE_WARPS = 8
DECODE = {
    (2, 64, 16): (128, 4, 3), (2, 64, 32): (64, 4, 3), (2, 64, 64): (64, 4, 3),
    (2, 128, 16): (64, 4, 3), (2, 128, 32): (64, 4, 3), (2, 128, 64): (32, 4, 3),
    (2, 256, 16): (32, 4, 3), (2, 256, 32): (16, 4, 3), (2, 256, 64): (16, 8, 3),
    (4, 64, 16): (32, 4, 3), (4, 128, 16): (16, 4, 2), (4, 256, 16): (16, 8, 2),
}  # fmt: skip
_HALF_THE_SHARED_MEMORY = {
    (2, 64, 16): (64, 4, 3), (2, 128, 16): (32, 4, 3), (2, 128, 32): (32, 4, 3), (2, 128, 64): (32, 4, 2),
    (2, 256, 16): (16, 4, 3), (4, 64, 16): (32, 4, 2), (4, 256, 16): (16, 4, 1),
}  # fmt: skip
DECODE_BY_ARCHITECTURE = {
    "sm_86": _HALF_THE_SHARED_MEMORY,
    "sm_89": _HALF_THE_SHARED_MEMORY,
    "sm_100": {(4, 128, 16): (32, 8, 2)},
    "gfx942": {
        (2, 64, 16): (64, 4, 2), (2, 64, 32): (64, 4, 2), (2, 64, 64): (64, 4, 2),
        (2, 128, 16): (32, 4, 2), (2, 128, 32): (32, 4, 2), (2, 128, 64): (32, 4, 2),
        (2, 256, 16): (16, 4, 2), (2, 256, 32): (16, 4, 2), (2, 256, 64): (16, 4, 2),
        (4, 64, 16): (32, 4, 2), (4, 128, 16): (16, 4, 2), (4, 256, 16): (16, 4, 1),
    },
}  # fmt: skip


def decode_config(device: torch.device, itemsize: int, width: int, rows: int) -> dict[str, Any]:
    """Keyword arguments of a launch of attention_decode_kernel for ``rows`` queries of a group."""
    block_d, block_m = max(16, next_power_of_2(width)), max(16, next_power_of_2(rows))
    name, key = configured_architecture(device), (itemsize, max(64, block_d), block_m)
    configs = DECODE | DECODE_BY_ARCHITECTURE.get(name, {})
    names = ("BLOCK_N", "num_warps", "num_stages")
    tuned = choose("attention_decode", device, key, dict(zip(names, configs[key], strict=True)))
    plain = itemsize == 2 or name.startswith("gfx") or block_d == 256
    return {
        "D": width, "BLOCK_D": block_d, "BLOCK_M": block_m, "PRECISION": "ieee" if plain else "tf32x3",
        **tuned,
    }  # fmt: skip


def describable(*tensors: Tensor) -> bool:
    """Whether the copy engine of sm_90 and later can fetch tiles of all (B, H, T, D): half precision, every
    row aligned to 16 bytes."""
    name = architecture(tensors[0].device)
    if not name.startswith("sm_") or int(name.removeprefix("sm_")) < 90:
        return False
    strides = [s for x in tensors for size, s in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride % 8 == 0 for stride in strides)
    return aligned and all(x.itemsize == 2 and x.data_ptr() % 16 == 0 for x in tensors)


def operands(config: dict[str, Any], *tiles: tuple[Tensor, str]) -> list[Any]:
    """Each tensor, or its descriptor if ``config`` asks for one; "BLOCK_M" or "BLOCK_N" cuts its rows."""
    if not config["DESCRIPTORS"]:
        return [x for x, _ in tiles]
    return [
        # The stride of a dimension of size 1 is arbitrary; the engine wants a valid one.
        TensorDescriptor(
            x,
            list(x.shape),
            [stride if size > 1 else 8 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
            + [1],
            [1, 1, config[block], config["BLOCK_D"]],
        )
        for x, block in tiles
    ]

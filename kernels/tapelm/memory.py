"""Memory that the CPU ops keep between calls, under the names that torch.cuda has for it.

Results and scratch space of a megabyte and more lie in segments that are kept, because giving them back and
faulting them in again costs a tenth of a training step. Smaller ones are the C library's.
"""

from __future__ import annotations

import torch

from . import _library  # noqa: F401, loads the extension


def empty_cache() -> None:
    """Gives the memory that the CPU ops keep and no tensor uses back to the system.

    The next ops fault theirs in anew. Tensors are not moved: what lies between two of them is given back, but
    its addresses stay reserved.
    """
    torch.ops.tapelm.empty_cache.default()


def memory_stats() -> dict[str, int]:
    """What the CPU ops hold, in bytes.

    Returns:
        "reserved_bytes.all.current": the addresses of all segments, of which pages that no tensor has used or
        that ``empty_cache`` has given back take no memory; "allocated_bytes.all.current": the part that
        tensors use.
    """
    held, free = torch.ops.tapelm.memory_sizes.default()
    return {"allocated_bytes.all.current": held - free, "reserved_bytes.all.current": held}

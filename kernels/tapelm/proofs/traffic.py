"""Bytes, 32-byte sectors and matrix-product flops of interpreted Triton kernels.

with counted_traffic() as traffic:
    layer_norm_forward_kernel[grid](...)
traffic.bytes, traffic.flops, traffic.of("x_ptr").loaded
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from .accesses import Access, Dot, observed

SECTOR = 32
RESIDENT = 1 << 16


@dataclass
class Flow:
    """Traffic of one argument of one kernel. An atomic both loads and stores."""

    loaded: int = 0
    """Bytes over all loads, repeated ones included."""
    stored: int = 0
    sectors: int = 0
    """32-byte sectors touched, over all accesses: 32 * sectors / bytes is 1 where access is dense."""
    sectors_seen: set[int] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    @property
    def footprint(self) -> int:
        """Bytes of the distinct sectors."""
        return SECTOR * len(self.sectors_seen)


@dataclass
class Traffic:
    """What was counted, by (kernel, argument); pointers out of integers count as argument "(address)"."""

    flows: dict[tuple[str, str], Flow] = field(default_factory=lambda: defaultdict(Flow))
    flops: int = 0

    @property
    def bytes(self) -> int:
        """All bytes that the kernels asked for."""
        return sum(flow.bytes for flow in self.flows.values())

    def memory_bytes(self, resident: int = RESIDENT) -> int:
        """Bytes that reach memory, when an argument of at most ``resident`` bytes stays in the cache.

        Such an argument (a weight vector, a seed, a table) is fetched once however often programs read it.
        Larger ones count at every access: a kernel that goes over its rows twice is charged twice.
        """
        return sum(
            min(flow.bytes, flow.footprint) if flow.footprint <= resident else flow.bytes
            for flow in self.flows.values()
        )

    def of(self, argument: str, kernel: str | None = None) -> Flow:
        """The flow of ``argument``, over all kernels that have one of this name, or of one ``kernel``."""
        total = Flow()
        for (owner, name), flow in self.flows.items():
            if name == argument and kernel in (None, owner):
                total.loaded += flow.loaded
                total.stored += flow.stored
                total.sectors += flow.sectors
                total.sectors_seen |= flow.sectors_seen
        return total


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts what kernels interpreted within it move; needs TRITON_INTERPRET=1 before triton is imported."""
    traffic = Traffic()

    def count(event: Access | Dot) -> None:
        if isinstance(event, Dot):
            traffic.flops += event.flops
            return
        name = "(address)" if event.argument is None else event.argument.name
        flow = traffic.flows[event.kernel, name]
        size = event.addresses.size * event.itemsize
        flow.loaded += size if event.kind != "store" else 0
        flow.stored += size if event.kind != "load" else 0
        sectors = np.unique(event.addresses // SECTOR).tolist()
        flow.sectors += len(sectors)
        flow.sectors_seen.update(sectors)

    with observed(count):
        yield traffic

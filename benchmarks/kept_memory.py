"""Memory that the C library keeps, so that neither side of a comparison waits for pages of the system.

glibc hands freed tensors of megabytes back to the system, or not, by what was freed before; PyTorch then pays
for faulting them in again, 3 to 9 times what a memory-bound op needs, and no two runs agree. Benchmarks
start themselves anew with glibc told to keep all of it, in huge pages and for all threads alike, which only
the environment of a new process can say; the ladder shows what that buys as a rung of its own.

https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator

VARIABLE = "GLIBC_TUNABLES"
STOCK, PIECE = 4 << 30, 1 << 29  # bytes
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "mmap_max": 0,  # no mapping of its own for a large block: freeing it would unmap it
        "trim_threshold": 1 << 36,
        "top_pad": 1 << 26,
        "hugetlb": 1,  # transparent huge pages
        "arena_max": 1,  # what the thread of the backward pass frees, the main thread takes
    }.items()
)


def is_kept() -> bool:
    return os.environ.get(VARIABLE) == TUNABLES


def restart() -> None:
    """Start this program anew with its memory kept, unless the C library is another or told otherwise.

    Set GLIBC_TUNABLES, if only to nothing, to measure with what it says.
    """
    if VARIABLE not in os.environ and platform.libc_ver()[0] == "glibc":
        os.environ[VARIABLE] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def stock_up() -> None:
    """Touch a quarter of the memory that is free, at most STOCK, and free it, which the C library keeps.

    Before rounds are taken, where memory is kept; else nothing is done.

    What it finds no place for among freed blocks is then not waited for either: PyTorch's dropout of 100 MB
    takes more memory in some of its first dozens of calls, and such a call takes three times as long. In
    pieces larger than any tensor of a benchmark, as freed blocks hold them where they would not hold it all.
    """
    import torch

    if is_kept():
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        stock = min(STOCK, free // 4)
        pieces = [torch.ones(min(PIECE, stock) // 4) for _ in range(max(1, stock // PIECE))]
        del pieces


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Processes that start meanwhile treat memory as the C library does by itself."""
    kept = is_kept()
    if kept:
        del os.environ[VARIABLE]
    try:
        yield
    finally:
        if kept:
            os.environ[VARIABLE] = TUNABLES

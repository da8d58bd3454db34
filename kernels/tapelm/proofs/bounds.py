"""Out-of-bounds checker for interpreted Triton kernels: each access must fall on an element of its argument.

A tensor that is a view owns only its own elements, not those that its strides skip: reading a neighbour's
head in a fused projection is an error although the memory is there. Pointers that a kernel takes from a table
of addresses must fall on elements of the tensors named to ``checked_bounds``, which are best put
``between_guards``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from .accesses import Access, Dot, observed

GUARD_BYTES = 4096


class OutOfBounds(IndexError):
    """A kernel accessed memory that is no element of its argument."""


def between_guards(tensor: Tensor) -> Tensor:
    """A copy with the same strides in a storage of its own, with ``GUARD_BYTES`` before and after that no one
    owns.

    The guards hold 0xFF: NaN as floats, -1 as integers.
    """
    extent = _extent(tensor)
    size = extent * tensor.itemsize
    storage = torch.full((size + 2 * GUARD_BYTES,), 0xFF, dtype=torch.uint8)
    elements = storage[GUARD_BYTES : GUARD_BYTES + size].view(tensor.dtype)
    return elements.as_strided(tensor.shape, tensor.stride(), elements.storage_offset()).copy_(tensor)


def _extent(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def owned(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
    """Which of ``addresses`` (uint64, bytes) are the start of an element of ``tensor``."""
    offset = addresses.astype(np.int64) - tensor.data_ptr()
    inside = (offset >= 0) & (offset % tensor.itemsize == 0) & (tensor.numel() > 0)
    left = offset // tensor.itemsize
    # The index in each dimension, from the largest stride down; what is left at the end lies between
    # elements.
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride and size > 1:
            index = np.minimum(left // stride, size - 1)
            left = left - index * stride
    return inside & (left == 0)


@contextmanager
def checked_bounds(tensors: Sequence[Tensor] = ()) -> Iterator[None]:
    """Within it, an interpreted kernel raises before its first access outside its arguments.

    Args:
        tensors: those that kernels reach through addresses stored in memory.

    Raises:
        OutOfBounds: names kernel, program, argument and how far outside the access is.
    """

    def check(event: Access | Dot) -> None:
        if isinstance(event, Dot):
            return
        if event.argument is not None:
            valid = owned(event.argument.tensor, event.addresses)
        else:
            valid = np.zeros(event.addresses.shape, dtype=bool)
            for tensor in tensors:
                valid |= owned(tensor, event.addresses)
        if valid.all():
            return
        first = int(event.addresses[~valid][0])
        where = f"address {first:#x}"
        if event.argument is not None:
            tensor = event.argument.tensor
            where = (
                f"{event.argument.name} {tuple(tensor.shape)} of strides {tensor.stride()} at element offset "
                f"{(first - tensor.data_ptr()) / tensor.itemsize:g}"
            )
        raise OutOfBounds(
            f"{event.kernel}, program {event.program}: {event.kind} of {where}; "
            f"{int((~valid).sum())} of {valid.size} lanes are outside."
        )

    try:
        with observed(check):
            yield
    except InterpreterError as error:
        # Once per level of calls among kernels.
        cause = error.__cause__
        while isinstance(cause, InterpreterError):
            cause = cause.__cause__
        if isinstance(cause, OutOfBounds):
            raise cause from None
        raise

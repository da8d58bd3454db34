"""Every pointer access of interpreted Triton kernels, with the argument that the pointer comes from.

While accesses are observed, each tensor argument of a launch is known by a number in the upper 16 bits of its
address, which no machine uses. Pointer arithmetic keeps them, so that an access far outside its tensor is
still attributed to it, even where it lands inside another tensor. Before memory is touched the number is
taken off.

Pointers that a kernel makes out of integers (a table of addresses) have number 0 and belong to no argument.
"""

# Triton's stubs do not know its own interpreter.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)


@dataclass(frozen=True)
class Argument:
    """A tensor argument of the launch under way."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program; only lanes whose mask is true are in it."""

    kernel: str
    program: tuple[int, int, int]
    kind: str
    """"load", "store" or "atomic"."""
    argument: Argument | None
    """None for pointers made out of integers."""
    addresses: np.ndarray
    """uint64, flat."""
    itemsize: int


@dataclass(frozen=True)
class Dot:
    """One matrix product of one program."""

    kernel: str
    flops: int


@contextmanager
def observed(observe: Callable[[Access | Dot], None]) -> Iterator[None]:
    """Within it, ``observe`` is called before every access and product of every interpreted kernel.

    An exception it raises stops the kernel before the access happens. Needs TRITON_INTERPRET=1 in the
    environment before triton is imported, and CPU tensors.
    """
    observer = _Observer(observe)
    replaced = observer.replacements()
    originals = {(owner, name): getattr(owner, name) for owner, name in replaced}
    for (owner, name), method in replaced.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for (owner, name), method in originals.items():
            setattr(owner, name, method)


class _Observer:
    def __init__(self, observe: Callable[[Access | Dot], None]) -> None:
        self.observe = observe
        self.kernel = ""
        self.arguments: list[Argument] = []
        self.tagged = 0

    def replacements(self) -> dict[tuple[Any, str], Callable[..., Any]]:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
        launch, convert = executor.__call__, interpreter._implicit_cvt

        def on_launch(grid: Any, *arguments: Any, **keywords: Any) -> Any:
            known = {name: value for name, value in keywords.items() if name in grid.arg_names}
            bound = inspect.getcallargs(grid.fn, *arguments, **known)
            self.kernel, self.tagged = grid.fn.__name__, 0
            self.arguments = [
                each
                for name, value in bound.items()
                if name not in grid.constexprs
                for each in _named(name, value)
            ]
            return launch(grid, *arguments, **keywords)

        def on_convert(argument: Any) -> Any:
            converted = convert(argument)
            if hasattr(argument, "data_ptr"):
                self.tagged += 1
                converted.handle.data = converted.handle.data | (np.uint64(self.tagged) << _TAG_SHIFT)
            return converted

        def on_load(this: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
            return load(this, self.access(this, "load", pointers, mask), mask, *rest, **keywords)

        def on_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
            return store(this, self.access(this, "store", pointers, mask), value, mask, *rest, **keywords)

        def on_rmw(this: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            return rmw(this, operation, self.access(this, "atomic", pointers, mask), value, mask, *rest)

        def on_cas(this: Any, pointers: Any, *rest: Any) -> Any:
            return cas(this, self.access(this, "atomic", pointers, None), *rest)

        def on_dot(this: Any, a: Any, b: Any, *rest: Any) -> Any:
            self.observe(Dot(self.kernel, 2 * int(np.prod(a.data.shape)) * b.data.shape[-1]))
            return dot(this, a, b, *rest)

        return {
            (executor, "__call__"): on_launch,
            (interpreter, "_implicit_cvt"): on_convert,
            (builder, "create_masked_load"): on_load,
            (builder, "create_masked_store"): on_store,
            (builder, "create_atomic_rmw"): on_rmw,
            (builder, "create_atomic_cas"): on_cas,
            (builder, "create_dot"): on_dot,
        }

    def access(self, builder: Any, kind: str, pointers: Any, mask: Any) -> Any:
        """Reports the access; returns the pointers as real addresses."""
        tagged = np.asarray(pointers.data)
        plain = interpreter.TensorHandle(tagged & _ADDRESS, pointers.dtype)
        chosen = (
            tagged
            if mask is None
            else tagged[np.broadcast_to(np.asarray(mask.data, dtype=bool), tagged.shape)]
        )
        if chosen.size:
            number = int(chosen.flat[0] >> _TAG_SHIFT)
            assert (chosen >> _TAG_SHIFT == number).all(), (
                f"{self.kernel}: one access with pointers of two tensors"
            )
            argument = self.arguments[number - 1] if number else None
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            flat = (chosen & _ADDRESS).ravel()
            self.observe(Access(self.kernel, builder.grid_idx, kind, argument, flat, itemsize))
        return plain


def _named(name: str, value: Any) -> Iterator[Argument]:
    if isinstance(value, Tensor):
        yield Argument(name, value)
    elif isinstance(value, TensorDescriptor):
        yield Argument(name, value.base)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, each in enumerate(value):
            yield from _named(f"{name}[{index}]", each)

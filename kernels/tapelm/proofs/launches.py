"""Captures the launches of Triton kernels instead of running them.

    with captured_launches() as launches:
        launch_layer_norm_forward(x, weight, bias, 1e-5)          # tensors on the meta device
    launches[0].specialize(TARGETS["sm_90"])                      # what the JIT would compile, argument by
    argument

A meta tensor's address is 0, which is divisible by 16 as that of any fresh CUDA tensor is; views keep their
real offset only in ``storage_offset``, which is checked here, so that a misaligned view is not taken for an
aligned one.
"""

# Triton's stubs do not know its own runtime.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITCallable, JITFunction, create_function_from_signature


class _AlignedView:
    """A meta tensor view with the address it would have in a storage that starts at a multiple of 256."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.address = int(tensor.storage_offset()) * tensor.itemsize
        self.bytes = tensor.untyped_storage().size()

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        """Bytes of the storage, by which Triton knows whether AMD's buffer instructions reach all of it."""
        return self.bytes


@dataclass(frozen=True)
class Specialized:
    """What the compiler is given: the source with its specialised signature, and the target's options."""

    source: ASTSource
    options: dict[str, Any]
    key: str
    """Hash of what the machine code depends on: kernel and callees, signature, options, target, Triton."""


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def specialize(self, target: GPUTarget) -> Specialized:
        """The source and options that Triton's JIT would derive from these arguments on ``target``."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        keywords = {
            **self.keywords, "debug": False, "instrumentation_mode":
            triton.knobs.compilation.instrumentation_mode,
        }  # fmt: skip
        arguments = [_addressed(argument) for argument in self.arguments]
        keywords = {name: _addressed(argument) for name, argument in keywords.items()}
        bound, specialization, options = bind(*arguments, **keywords)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, keywords, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        described = (
            _definition(self.kernel), signature, [(path, repr(value)) for path, value in constants.items()],
            attributes, self.keywords.get("num_warps"), self.keywords.get("num_stages"), str(target),
            triton.__version__,
        )  # fmt: skip
        if (fusion := self.keywords.get("enable_fp_fusion")) is not None:
            described = (*described, fusion)
        key = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
        return Specialized(source, dict(options.__dict__), key)


def _addressed(argument: Any) -> Any:
    return _AlignedView(argument) if isinstance(argument, Tensor) and argument.is_meta else argument


@cache
def _definition(kernel: JITCallable) -> str:
    """The syntax trees of ``kernel`` and of what it calls, with the constants they use.

    Unlike Triton's own key it ignores comments, layout and line numbers.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    parts = [ast.dump(tree)]
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        used = kernel.__globals__.get(name)
        if isinstance(used, JITCallable) and used is not kernel:
            parts.append(_definition(used))
        elif isinstance(used, tl.constexpr | int | float | str | bool):
            parts.append(f"{name}={used!r}")
    return "\n".join(parts)


@contextmanager
def captured_launches() -> Iterator[list[Launch]]:
    """Within it, launching a ``triton.jit`` kernel appends a ``Launch`` to the list that it yields, and runs
    nothing.

    Raises:
        RuntimeError: Triton was imported for its interpreter, which has no kernels to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "captured_launches: kernels were imported for the interpreter; unset TRITON_INTERPRET."
        )
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if callable(grid):
            grid = grid(
                inspect.signature(self.fn).bind_partial(*arguments, **_known(self, keywords)).arguments
            )
        launches.append(Launch(self, tuple(grid), arguments, keywords))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _known(kernel: JITFunction, keywords: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name in kernel.arg_names}

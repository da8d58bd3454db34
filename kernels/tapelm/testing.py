"""How an op is tested: against its reference in float64, by one table of tolerances, on all its devices.

``check_op`` covers values, gradients, determinism and strides; ``check_registration`` covers schema, fake and
autograd. ``interpreted_triton`` runs the Triton kernels on CPU tensors in Triton's interpreter, made honest
for bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from ._library import CUDA_LAUNCHERS

# dtype of the inputs -> (how many times PyTorch's own error in that dtype we may have, slack relative to the
# exact values). The slack is one rounding in the half-precision types; in float32 it covers exp of rounded
# scores.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (2.0, 2.0**-18),
    torch.bfloat16: (2.0, 2.0**-8),
    torch.float16: (2.0, 2.0**-11),
}


def assert_close(name: str, dtype: torch.dtype, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Asserts that our error against ``exact`` (float64) is within the tolerance of inputs of ``dtype``.

    Both the largest and the root-mean-square error are compared with those of ``theirs``, PyTorch in
    ``dtype``.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    factor, slack = TOLERANCES[dtype]
    assert bool(ours.isfinite().all()), f"{name}: not finite"
    for kind, norm in (
        ("largest", lambda x: float(x.abs().max())),
        ("rms", lambda x: float(x.square().mean().sqrt())),
    ):
        own, peer, floor = norm(ours.double() - exact), norm(theirs.double() - exact), slack * norm(exact)
        assert own <= factor * peer + floor, (
            f"{name}: {kind} error {own:.3e}, PyTorch's {peer:.3e}, slack {floor:.1e}"
        )


def _gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = op(*leaves)
    return y.detach(), torch.autograd.grad(
        y, leaves, torch.ones_like(y) if grad is None else grad.to(y.dtype)
    )


def _strided(x: Tensor) -> Tensor:
    """The same values in a tensor whose dimensions lie in memory in reverse order; a vector with stride 2."""
    if x.dim() == 1:
        return torch.stack([x, x], dim=1)[:, 0]
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def check_op(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, repeat: bool = True
) -> None:
    """Asserts that ``op`` equals ``reference`` in value and gradient, repeats exactly and takes any strides.

    Args:
        op: function of ``inputs`` alone; a random one must draw from a fixed seed.
        reference: the same function in plain PyTorch, run in float64 and in the dtype of the inputs.
        inputs: floating-point tensors; gradients of all of them are checked.
        repeat: False leaves out the rerun and the other strides, where running is slow.
    """
    generator = torch.Generator().manual_seed(7)
    exact_y = reference(*(x.double() for x in inputs))
    grad = torch.randn(exact_y.shape, generator=generator).to(inputs[0].dtype).to(exact_y.device)
    exact_y, exact = _gradients(reference, [x.double() for x in inputs], grad.double())
    theirs_y, theirs = _gradients(reference, inputs, grad)
    y, ours = _gradients(op, inputs, grad)
    dtype = inputs[0].dtype
    assert_close("value", dtype, y, theirs_y, exact_y)
    for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == dtype
        assert_close(f"gradient {index}", dtype, a, b, c)

    if not repeat:
        return
    again_y, again = _gradients(op, inputs, grad)
    assert torch.equal(y, again_y), "rerun: values differ"
    for index, (a, b) in enumerate(zip(ours, again, strict=True)):
        assert torch.equal(a, b), f"rerun: gradient {index} differs"
    # A matrix product may sum in another order when its operands lie differently in memory: tolerance, not
    # equality.
    strided_y, strided = _gradients(op, [_strided(x) for x in inputs], grad)
    assert_close("value with other strides", dtype, strided_y, theirs_y, exact_y)
    for index, (a, b, c) in enumerate(zip(strided, theirs, exact, strict=True)):
        assert_close(f"gradient {index} with other strides", dtype, a, b, c)


def check_registration(name: str, *args: Any) -> None:
    """Runs ``torch.library.opcheck`` on ``tapelm::name``: schema, fake tensors, autograd and compilation."""
    torch.library.opcheck(getattr(torch.ops.tapelm, name).default, args)


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


class _HonestBfloat16:
    """Replacements for methods of Triton's InterpreterBuilder, which keeps bfloat16 as raw uint16.

    The originals truncate on the way to bfloat16 and do arithmetic on the bits. These round to nearest even,
    multiply matrices in float32, and refuse element-wise arithmetic: a kernel must cast to float32 first.
    """

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    binary, unary, fma = builder.binary_op, builder.unary_op, builder.create_fma

    @staticmethod
    def _to_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_widen(handle.data), tl.float32)

    @classmethod
    def cast_impl(cls, builder: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == dtype.scalar:
            return cls.cast(builder, source, dtype)
        source = cls._to_float32(source)
        if dtype.scalar != tl.bfloat16:
            return cls.cast(builder, source, dtype)
        return interpreter.TensorHandle(_round(source.data.astype(np.float32)), tl.bfloat16)

    @classmethod
    def create_dot(cls, builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return cls.dot(builder, cls._to_float32(a), cls._to_float32(b), *rest)

    @classmethod
    def refuse(cls, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(builder: Any, handle: Any, *rest: Any) -> Any:
            if handle.dtype.scalar == tl.bfloat16:
                raise NotImplementedError("bfloat16 arithmetic in a Triton kernel: cast to float32 first.")
            return original(builder, handle, *rest)

        return operate


class _PatchedOnce:
    """A replacement for the interpreter's ``_patch_lang``, which a launch calls and, a third of the time that
    it takes, every call of a device function: what is patched stays so until the launch ends."""

    def __init__(self, patch: Callable[[Callable[..., Any]], Any]) -> None:
        self.patch = patch
        self.patched: set[str] = set()

    def __call__(self, function: Callable[..., Any]) -> Any:
        languages = _languages(function)
        if languages <= self.patched:
            return None  # to a device function, which leaves restoring to the launch
        scope = self.patch(function)
        self.patched |= languages
        restore = scope.restore

        def at_the_end() -> None:
            self.patched.clear()
            restore()

        scope.restore = at_the_end
        return scope


@cache
def _languages(function: Callable[..., Any]) -> frozenset[str]:
    """Which of Triton's modules a kernel sees, whose functions are replaced by those on arrays."""
    return frozenset(each.__name__ for each in function.__globals__.values() if each is tl or each is tl.core)


@contextmanager
def interpreted_triton() -> Iterator[None]:
    """Within it, ops on CPU tensors run their Triton kernels in the interpreter instead of the C++ kernels.

    Needs TRITON_INTERPRET=1 in the environment before triton is imported.
    """
    honest, builder = _HonestBfloat16, interpreter.InterpreterBuilder
    replaced = {
        "cast_impl": lambda self, *args: honest.cast_impl(self, *args),
        "create_dot": lambda self, *args: honest.create_dot(self, *args),
        "binary_op": honest.refuse(honest.binary),
        "unary_op": honest.refuse(honest.unary),
        "create_fma": honest.refuse(honest.fma),
    }
    originals = {name: getattr(builder, name) for name in replaced}
    patch_language = interpreter._patch_lang
    library = torch.library.Library("tapelm", "IMPL")
    try:
        for name, method in replaced.items():
            setattr(builder, name, method)
        interpreter._patch_lang = _PatchedOnce(patch_language)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns about the override that is wanted here
            for name, launch in CUDA_LAUNCHERS.items():
                library.impl(name, launch, "CPU", allow_override=True)
        with np.errstate(all="ignore"):
            yield
    finally:
        library._destroy()
        interpreter._patch_lang = patch_language
        for name, method in originals.items():
            setattr(builder, name, method)

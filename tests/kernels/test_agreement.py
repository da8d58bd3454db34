"""The C++ kernels and the Triton kernels compute the same: to rounding, dropout and AdamW bit for bit.

Triton runs on the GPU where there is one and else in its interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.subjects import NOT_TRITON, SUBJECTS, Subject, random
from tapelm._library import CUDA_LAUNCHERS
from tapelm._philox import keep_reference
from tapelm.testing import interpreted_triton

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Optimizers keep float32 or bfloat16 parameters, never float16.
HALF_SUBJECTS = [s for s in SUBJECTS if s.launcher not in ("adamw_step_", "grad_norm", *NOT_TRITON)]


def named(subjects: list[Subject]) -> dict:
    return {"argvalues": subjects, "ids": [subject.launcher for subject in subjects]}


def flat(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for each in values for t in flat(each)] if isinstance(values, tuple | list) else []


def directly(launcher: str, *arguments: object) -> list[Tensor]:
    """Results of the C++ kernel, then its arguments, some of which an op changes."""
    return flat((getattr(torch.ops.tapelm, launcher)(*arguments), arguments))


def on_triton(launcher: str, *arguments: object) -> list[Tensor]:
    """As directly, of the Triton kernel."""
    if DEVICE == "cuda":
        moved = pytree.tree_map_only(Tensor, Tensor.cuda, arguments)
        return [tensor.cpu() for tensor in directly(launcher, *moved)]
    with interpreted_triton():
        return flat((CUDA_LAUNCHERS[launcher](*arguments), arguments))


def assert_near(ours: list[Tensor], theirs: list[Tensor], slack: float, where: object) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        if a.numel():
            error = float((a.double() - b.double()).abs().max())
            assert error <= slack * (1e-3 + float(b.double().abs().max())), (where, error)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subject", **named(list(SUBJECTS)))
def test_both_implementations_agree(subject: Subject, dtype: torch.dtype) -> None:
    for shape in subject.odd:
        ours = directly(subject.launcher, *subject.arguments(random(dtype), *shape))
        theirs = on_triton(subject.launcher, *subject.arguments(random(dtype), *shape))
        assert [a.dtype for a in ours] == [b.dtype for b in theirs]
        if subject.launcher in ("dropout", "adamw_step_"):
            assert torch.equal(ours[0], theirs[0])
        assert_near(ours, theirs, 2.0**-15 if dtype == FP32 else 2.0**-6, shape)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("launcher", "inputs"),
    [("bias_gelu_forward", 2), ("bias_gelu_backward", 3), ("swiglu_forward", 2), ("swiglu_backward", 3)],
)
def test_elements_agree_at_infinity_and_near_overflow(launcher: str, inputs: int, dtype: torch.dtype) -> None:
    """Every combination of such inputs, NaN where the other has NaN."""
    far = [-torch.inf, -3e38, -1e30, -100.0, 0.0, 1.0, 100.0, 1e30, 3e38, torch.inf, torch.nan]
    columns = torch.cartesian_prod(*[torch.tensor(far, dtype=dtype)] * inputs).unbind(1)
    tolerance = 2.0**-15 if dtype == FP32 else 2.0**-6
    for a, b in zip(directly(launcher, *columns), on_triton(launcher, *columns), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("launcher", ["layer_norm_forward", "add_norm_forward"])
def test_norms_agree_where_squares_overflow(launcher: str) -> None:
    """Such a row has no scale left: its result is the bias. One that is infinite is NaN."""
    x = torch.randn(3, 64)
    x[1] *= 1e30
    x[2, 5] = torch.inf
    weight, bias = torch.full((64,), 2.0), torch.full((64,), 0.5)
    added, dropout = (), ()
    if launcher == "add_norm_forward":
        added, dropout = (torch.zeros_like(x),), (0.0, None)
    arguments = (x, *added, weight, bias, 1e-5, *dropout)
    ours, theirs = directly(launcher, *arguments), on_triton(launcher, *arguments)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-15, atol=2.0**-15, equal_nan=True)
    assert (ours[0][1] == 0.5).all() and ours[0][2].isnan().all()


@pytest.mark.parametrize("subject", **named(HALF_SUBJECTS))
def test_float16_agrees_with_float32(subject: Subject) -> None:
    """float16 is for GPUs alone: its kernel against the C++ kernel on the same numbers in float32."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == FP16 else tensor

    for shape in subject.odd:
        exact = directly(subject.launcher, *subject.arguments(random(FP16, widened), *shape))
        ours = on_triton(subject.launcher, *subject.arguments(random(FP16), *shape))
        assert_near(ours, exact, 2.0**-9, shape)


def test_masks_of_add_norm_are_equal() -> None:
    """Zero residuals leave dropout(x) as the sum; widths that are no multiple of eight go another way."""
    seed = torch.tensor(2**40 + 77)
    for shape in ((37, 64), (5, 13)):
        x, zero, weight = torch.rand(shape) + 1, torch.zeros(shape), torch.ones(shape[1])
        expected = keep_reference(torch.arange(x.numel()), 0.3, seed).view(shape)
        for run in (directly, on_triton):
            total = run("add_norm_forward", x, zero, weight, None, 1e-5, 0.3, seed)[1]
            assert torch.equal(total != 0, expected), (run, shape)


@pytest.mark.parametrize(
    ("T", "S", "row"), [(41, 41, 48), (48, 48, 48), (7, 7, 8), (3, 41, 48), (1, 40, 40), (41, 7, 8)]
)
def test_masks_of_attention_are_equal(T: int, S: int, row: int) -> None:
    """Uniform weights times the identity: the output is the dropped weights themselves. A row of the stream
    takes S rounded up to eight."""
    heads, seed = 2, torch.tensor(2**40 + 77)
    q, k = torch.zeros(1, heads, T, 64), torch.zeros(1, heads, S, 64)
    v = torch.eye(S, 64).expand(1, heads, S, 64)
    index = torch.arange(heads * T)[:, None] * row + torch.arange(S)
    expected = keep_reference(index, 0.3, seed).view(heads, T, S)
    for run in (directly, on_triton):
        for causal in (False, True) if S >= T else (False,):
            out = run("attention_forward", q, k, v, causal, 1.0, 0.3, seed, None)[0]
            visible = torch.ones(T, S, dtype=torch.bool).tril(S - T) | (not causal)
            assert torch.equal(out[0, :, :, :S] != 0, expected & visible), run

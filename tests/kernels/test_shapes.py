"""A Triton launcher refuses tensors that are too short for its kernel; as the C++ kernels do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.subjects import SUBJECTS, Subject, random
from tapelm._library import CUDA_LAUNCHERS
from tapelm._shapes import shape_check
from tapelm.proofs.bounds import between_guards, checked_bounds
from tapelm.testing import interpreted_triton

INTERPRETED = [subject for subject in SUBJECTS if subject.odd]


def _shortened(arguments: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments with one tensor shorter by one in one dimension, and which."""

    def tensors(values: Any, where: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                yield (*where, index), value
            elif isinstance(value, list):
                yield from tensors(value, (*where, index))

    def replaced(values: Any, where: tuple[int, ...], new: Tensor) -> Any:
        first, *rest = where
        each = replaced(values[first], tuple(rest), new) if rest else new
        return type(values)([*values[:first], each, *values[first + 1 :]])

    for where, tensor in tensors(arguments):
        for dimension, size in enumerate(tensor.shape):
            if size:
                shorter = between_guards(tensor.narrow(dimension, 0, size - 1).contiguous())
                yield f"argument {where}, dimension {dimension}", replaced(arguments, where, shorter)


@pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are not interpreted where a GPU runs them"
)
@pytest.mark.parametrize("subject", INTERPRETED, ids=[subject.launcher for subject in INTERPRETED])
def test_no_kernel_reads_behind_a_tensor_that_is_too_short(subject: Subject) -> None:
    """Either it is refused or all accesses stay inside: a shorter x alone is another call."""
    refused = 0
    arguments = subject.arguments(random(torch.float32, between_guards), *subject.odd[0])
    for which, shorter in _shortened(arguments):
        with interpreted_triton(), checked_bounds(_flat(shorter)):
            try:
                CUDA_LAUNCHERS[subject.launcher](*shorter)
            except (ValueError, RuntimeError):
                refused += 1
            except Exception as error:
                raise AssertionError(which) from error
    assert refused or len(_flat(arguments)) == 1 or subject.launcher in ("dropout", "grad_norm")


def _flat(arguments: Any) -> list[Tensor]:
    found = []
    for each in arguments:
        found += [each] if isinstance(each, Tensor) else _flat(each) if isinstance(each, list) else []
    return found


def test_what_is_told_of_a_wrong_shape() -> None:
    def launch(x: Tensor, table: Tensor, scale: float, weight: Tensor | None) -> None: ...

    check = shape_check("op", launch, {"x": "*S N", "table": "T N | 2 T N", "weight": "N"})
    x, table, weight = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(8)
    check((x, table, 1.0, weight))
    check((x, torch.zeros(2, 5, 8), 1.0, None))
    check((weight, table, 1.0, weight))
    for arguments, told in (
        ((x, table, 1.0, weight[1:]), r"op: weight is \(7,\); it must be \(8,\)\."),
        ((x, table, 1.0, table), r"op: weight is \(5, 8\); it must be \(8,\)\."),
        (
            (x, torch.zeros(3, 5, 8), 1.0, weight),
            r"table is \(3, 5, 8\); it must be \(T, 8\) or \(2, T, 8\)\.",
        ),
        ((torch.zeros(()), table, 1.0, weight), r"x is \(\); it must be \(\*S, N\)\."),
    ):
        with pytest.raises(ValueError, match=told):
            check(arguments)

"""Dropout, forward and backward, against torch.nn.functional.dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case

SHAPES = ((4096, 512), (8192, 3072))
P = 0.1


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def same_rate(ours: Sequence[torch.Tensor], _: Any) -> None:
    """Two generators cannot agree element by element; the share of zeros and the gradient's mask must."""
    dropped = (ours[0] == 0).float().mean().item()
    if abs(dropped - P) > 0.01 or not torch.equal(ours[0] == 0, ours[1] == 0):
        raise AssertionError(f"dropout drops {dropped:.3f} instead of {P}, or its gradient has another mask")


def case(device: torch.device, shape: tuple[int, int]) -> Case:
    x, grad = torch.rand(shape, device=device) + 1, torch.ones(shape, device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = function(leaf, P)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad)]

    return Case(
        subject="dropout fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={"torch": partial(run, F.dropout), "tapelm": partial(run, tapelm.dropout)},
        bound="copy",
        work=4 * x.numel() * 4,  # read and write, twice
        agree=same_rate,
    )

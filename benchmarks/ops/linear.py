"""Linear layers of the seed preset, forward and backward, against torch.nn.functional.linear."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((4096, 512, 1536), (4096, 512, 2048), (4096, 2048, 512), (1, 64, 64))  # rows, in, out


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def case(device: torch.device, shape: tuple[int, int, int]) -> Case:
    rows, n_in, n_out = shape
    x, grad = torch.randn(rows, n_in, device=device), torch.randn(rows, n_out, device=device)
    weight, bias = torch.randn(n_out, n_in, device=device) / n_in**0.5, torch.randn(n_out, device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="linear fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={"torch": partial(run, F.linear), "tapelm": partial(run, tapelm.linear)},
        bound="gemm",
        work=6 * rows * n_in * n_out,
        agree=close(1e-4, 1e-3),
    )

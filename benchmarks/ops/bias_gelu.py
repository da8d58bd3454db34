"""gelu(x + bias), forward and backward, against the two PyTorch calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((4096, 2048), (8192, 3072))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def case(device: torch.device, shape: tuple[int, int]) -> Case:
    x, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    bias = torch.randn(shape[1], device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="bias_gelu fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={
            "torch": partial(run, lambda x, b: F.gelu(x + b, approximate="tanh")),
            "tapelm": partial(run, tapelm.bias_gelu),
        },
        bound="copy",
        work=5 * x.numel() * 4,  # x and y; x, grad and dx
        agree=close(1e-4, 1e-3),
    )

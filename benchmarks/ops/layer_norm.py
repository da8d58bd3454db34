"""Layer normalisation, forward and backward, against torch.nn.functional.layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((4096, 512), (8192, 768), (2048, 4096), (1, 64))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def case(device: torch.device, shape: tuple[int, int]) -> Case:
    x, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    weight, bias = torch.rand(shape[1], device=device), torch.rand(shape[1], device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="layer_norm fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={
            "torch": partial(run, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-5)),
            "tapelm": partial(run, lambda x, w, b: tapelm.layer_norm(x, w, b, 1e-5)),
        },
        bound="copy",
        work=5 * x.numel() * 4,  # x and y; x, grad and dx
        agree=close(1e-4, 1e-3),
    )

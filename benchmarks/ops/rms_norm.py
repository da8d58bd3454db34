"""Root-mean-square normalisation, forward and backward, against torch.nn.functional.rms_norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((4096, 512), (2048, 4096), (1, 64))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(shape[1], device=device).to(dtype)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, weight)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="rms_norm fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={
            "torch": partial(run, lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5)),
            "tapelm": partial(run, lambda x, w: tapelm.rms_norm(x, w, 1e-5)),
        },
        bound="copy",
        work=5 * x.numel() * x.element_size(),  # x and y; x, grad and dx
        agree=close(1e-4, 1e-3) if dtype == torch.float32 else close(0.05, 0.1),
    )

"""Layer normalisation, forward and backward, against torch.nn.functional.layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, agree_in_float32

SHAPES = ((4096, 512), (8192, 768), (2048, 4096), (1, 64))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(shape[1], device=device).to(dtype) for _ in range(2))

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    return Case(
        subject="layer_norm fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={
            "torch": partial(run, plain),
            "tapelm": partial(run, lambda x, w, b: tapelm.layer_norm(x, w, b, 1e-5)),
        },
        bound="copy",
        work=5 * x.numel() * x.element_size(),  # x and y; x, grad and dx
        agree=agree_in_float32(dtype, partial(run, plain), shape[0]),
    )

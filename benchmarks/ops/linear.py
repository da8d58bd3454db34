"""Linear layers of the seed preset, forward and backward, and logits of a decoded token, forward alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, agree_in_float32

SHAPES = ((4096, 512, 1536), (4096, 512, 2048), (4096, 2048, 512), (1, 64, 64))  # rows, in, out
DECODED = ((1, 576, 49152), (4, 576, 49152))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype)
        for shape in (*SHAPES, *DECODED)
        for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    rows, n_in, n_out = shape
    x, grad = (torch.randn(rows, n, device=device).to(dtype) for n in (n_in, n_out))
    weight = (torch.randn(n_out, n_in, device=device) / n_in**0.5).to(dtype)
    bias = torch.randn(n_out, device=device).to(dtype)

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    def forward(function: Callable[..., torch.Tensor], dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(x.to(dtype), weight.to(dtype))]

    decoded = shape in DECODED
    step = forward if decoded else run
    return Case(
        subject=f"linear {'fwd' if decoded else 'fwd+bwd'}",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(step, F.linear), "tapelm": partial(step, tapelm.linear)},
        bound="copy" if decoded else "gemm",
        work=weight.numel() * weight.element_size() if decoded else 6 * rows * n_in * n_out,
        agree=agree_in_float32(dtype, partial(step, F.linear), rows),
    )

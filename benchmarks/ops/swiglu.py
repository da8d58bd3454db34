"""silu(gate) * up, forward and backward, against the two PyTorch calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((4096, 1536), (2048, 8192))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> Case:
    gate, up, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (gate, up)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="swiglu fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(run, lambda g, u: F.silu(g) * u), "tapelm": partial(run, tapelm.swiglu)},
        bound="copy",
        work=8 * gate.numel() * gate.element_size(),  # gate, up, y; grad, gate, up, dgate, dup
        agree=close(1e-4, 1e-3) if dtype == torch.float32 else close(0.05, 0.05),
    )

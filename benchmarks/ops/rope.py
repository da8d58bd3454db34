"""Rotary embedding of views of a fused projection, forward and backward, against transformers' formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import tapelm
from benchmarks.harness import Case, close
from tapelm.rope import rope_reference

SHAPES = ((8, 12, 4, 256, 64), (1, 32, 8, 2048, 64))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Case:
    batch, q_heads, k_heads, time, width = shape
    fused = torch.randn(batch, time, q_heads + 2 * k_heads, width, device=device).to(dtype)
    q, k, _ = fused.transpose(1, 2).split([q_heads, k_heads, k_heads], dim=1)
    grads = [torch.randn(t.shape, device=device).to(dtype) for t in (q, k)]
    frequency = 10000.0 ** -(torch.arange(0, width, 2, device=device) / width)
    angle = torch.outer(torch.arange(time, device=device).float(), frequency).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def run(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (q, k)]
        out = function(*inputs, cos, sin)
        return [*(t.detach() for t in out), *torch.autograd.grad(out, inputs, grads)]

    return Case(
        subject="rope fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(run, rope_reference), "tapelm": partial(run, tapelm.rope)},
        bound="copy",
        work=4 * (q.numel() + k.numel()) * q.element_size(),  # read and write, twice
        agree=close(1e-4, 1e-3) if dtype == torch.float32 else close(0.05, 0.05),
    )

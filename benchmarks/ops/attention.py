"""Causal attention, forward and backward, against the plain masked softmax and PyTorch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close
from gpt.ops import causal_attention

SHAPES = ((16, 8, 256, 64), (4, 8, 1024, 64), (1, 8, 4096, 64), (4, 4, 512, 128))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def case(device: torch.device, shape: tuple[int, int, int, int]) -> Case:
    B, H, T, D = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(4))

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    return Case(
        subject="attention fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={
            "plain": partial(run, causal_attention),
            "sdpa": partial(run, partial(F.scaled_dot_product_attention, is_causal=True)),
            "tapelm": partial(run, tapelm.attention),
        },
        bound="gemm",
        work=7 * B * H * T * T * D,  # 2 + 5 products of T x T/2 x D, two flops each
        agree=close(1e-4, 1e-4),
    )

"""Linear layers with a low-rank update against dequantizing, F.linear and two products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import tapelm
from benchmarks.harness import Case, close

# rows, in, out; sizes of Llama-3.2-1B and SmolLM2-135M, and one decoded token.
SHAPES = ((512, 2048, 2048), (512, 2048, 8192), (1024, 576, 1536), (1, 2048, 8192))
RANK = 16


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype, quantized)
        for shape in SHAPES
        for dtype, quantized in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True))
    ]


def case(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, quantized: bool) -> Case:
    rows, k, n = shape
    x, grad, a, b, dense = (
        (torch.randn(size, device=device) / size[1] ** 0.5).to(dtype)
        for size in ((rows, k), (rows, n), (RANK, k), (n, RANK), (n, k))
    )
    weight = tapelm.nf4_quantize(dense) if quantized else dense

    def plain(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        w = tapelm.nf4_dequantize(weight) if isinstance(weight, tapelm.NF4Weight) else weight
        return F.linear(x, w) + 1.0 * F.linear(F.linear(x, a), b)

    def fused(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return tapelm.lora_linear(x, weight, a, b, 1.0)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (x, a, b)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def forward(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [function(x, a, b)]

    decoded = rows == 1  # a token, which has no gradient and has to read all weights
    parts = [weight.packed, *weight.state] if isinstance(weight, tapelm.NF4Weight) else [weight]
    read = sum(t.numel() * t.element_size() for t in (*parts, a, b))
    step = forward if decoded else run
    return Case(
        subject=f"lora {'nf4' if quantized else 'dense'} {'fwd' if decoded else 'fwd+bwd'}",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(step, plain), "tapelm": partial(step, fused)},
        bound="copy" if decoded else "gemm",
        work=read if decoded else 2 * rows * (2 * n * k + 3 * RANK * (n + k)),
        agree=close(1e-3, 1e-3) if dtype == torch.float32 else close(0.05, 0.1),
    )

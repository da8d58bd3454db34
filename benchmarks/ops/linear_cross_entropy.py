"""The head and its loss, forward and backward, against stored logits and torch's own fused call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((2048, 512, 10_000), (1024, 768, 50_304))  # tokens, width, vocabulary


LONG = 20_000
"""Of a larger vocabulary, torch's fused call takes seconds, 5 to 10 times as long as with stored logits.
Without options F.linear_cross_entropy stores them, too."""


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]


def case(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (hidden, weight)]
        loss = function(*inputs, targets)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    variants: dict[str, Callable[[], list[torch.Tensor]]] = {
        "stored logits": partial(run, lambda h, w, t: F.cross_entropy(F.linear(h, w), t)),
        "torch fused": partial(run, partial(F.linear_cross_entropy, options=LinearCrossEntropyOptions())),
        "tapelm": partial(run, tapelm.linear_cross_entropy),
    }
    if vocabulary > LONG:
        del variants["torch fused"]
    return Case(
        subject="linear_cross_entropy fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants=variants,
        bound="gemm",
        work=6 * tokens * width * vocabulary,
        agree=close(1e-4, 1e-6) if dtype == torch.float32 else close(0.1, 1e-4),
    )

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


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, shape) for shape in SHAPES]


def case(device: torch.device, shape: tuple[int, int, int]) -> Case:
    tokens, width, vocabulary = shape
    hidden = torch.randn(tokens, width, device=device)
    weight = torch.randn(vocabulary, width, device=device) / width**0.5
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [t.detach().requires_grad_() for t in (hidden, weight)]
        loss = function(*inputs, targets)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    return Case(
        subject="linear_cross_entropy fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=torch.float32,
        variants={
            "stored logits": partial(run, lambda h, w, t: F.cross_entropy(F.linear(h, w), t)),
            "torch fused": partial(run, partial(F.linear_cross_entropy, options=LinearCrossEntropyOptions())),
            "tapelm": partial(run, tapelm.linear_cross_entropy),
        },
        bound="gemm",
        work=6 * tokens * width * vocabulary,
        agree=close(1e-4, 1e-6),
    )

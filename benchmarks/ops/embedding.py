"""Token plus position embedding and dropout, forward and backward, against the PyTorch calls.

With dropout the generators differ, so that the results cannot be compared; without it they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tapelm
from benchmarks.harness import Case, close

SHAPES = ((8, 256, 10_000, 512), (16, 256, 50_304, 768), (1, 1, 1000, 64))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype, p)
        for shape in SHAPES
        for dtype in (torch.bfloat16, torch.float32)
        for p in (0.0, 0.1)
    ]


def torch_embedding(p: float, ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    place = torch.arange(ids.shape[1], device=ids.device)
    return F.dropout(F.embedding(ids, tokens) + F.embedding(place, positions), p)


def tapelm_embedding(p: float, ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    return tapelm.embedding(ids, tokens, positions, p)


def same_rate(p: float, ours: list[Tensor], _: list[Tensor]) -> None:
    dropped = (ours[0] == 0).float().mean().item()
    if abs(dropped - p) > 0.01 and ours[0].numel() > 10_000:
        raise AssertionError(f"embedding drops {dropped:.3f} instead of {p}")


def case(device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, p: float) -> Case:
    batch, time, vocabulary, width = shape
    ids = torch.randint(0, vocabulary, (batch, time), device=device)
    tables = [torch.randn(rows, width, device=device).to(dtype) for rows in (vocabulary, time)]
    grad = torch.randn(batch, time, width, device=device).to(dtype)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in tables]
        y = function(p, ids, *inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    compare = close(1e-4, 1e-3) if dtype == torch.float32 else close(0.05, 0.1)
    return Case(
        subject=f"embedding {'dropout ' if p else ''}fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(run, torch_embedding), "tapelm": partial(run, tapelm_embedding)},
        bound="copy",
        # rows of tokens and y; grad twice; the gradients of both tables, positions
        work=(4 * grad.numel() + sum(t.numel() for t in tables) + tables[1].numel()) * grad.element_size(),
        agree=partial(same_rate, p) if p else compare,
    )

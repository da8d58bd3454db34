"""residual + dropout(x) and its LayerNorm or RMSNorm, forward and backward, against the PyTorch calls.

With dropout the generators differ, so that the results cannot be compared; without it they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tapelm
from benchmarks.harness import Case, agree_in_float32

SHAPES = ((4096, 512), (8192, 768))


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [
        partial(case, device, shape, dtype, norm, p)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
        for norm, p in (("layer", 0.0), ("layer", 0.1), ("rms", 0.1))
    ]


def torch_add_norm(norm: str, p: float, x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    r = residual + F.dropout(x, p)
    return [F.layer_norm(r, w.shape, w, b, 1e-5) if norm == "layer" else F.rms_norm(r, w.shape, w, 1e-5), r]


def tapelm_add_norm(norm: str, p: float, x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
    if norm == "layer":
        return [*tapelm.add_layer_norm(x, residual, w, b, 1e-5, p)]
    return [*tapelm.add_rms_norm(x, residual, w, 1e-5, p)]


def same_rate(p: float, ours: list[Tensor], _: list[Tensor]) -> None:
    """The share of zeros in the gradient of x is the share dropped."""
    dropped = (ours[2] == 0).float().mean().item()
    if abs(dropped - p) > 0.01:
        raise AssertionError(f"add_norm drops {dropped:.3f} instead of {p}")


def case(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, norm: str, p: float) -> Case:
    x, residual, grad, grad_r = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    vectors = [torch.rand(shape[1], device=device).to(dtype) for _ in range(2)]

    def run(function: Callable[..., list[Tensor]], dtype: torch.dtype = dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, residual, *vectors)]
        used = inputs if norm == "layer" else inputs[:3]
        y, r = function(norm, p, *inputs)
        grads = torch.autograd.grad([y, r], used, [grad.to(dtype), grad_r.to(dtype)])
        return [y.detach(), r.detach(), *grads]

    return Case(
        subject=f"add_{norm}_norm {'dropout ' if p else ''}fwd+bwd",
        shape="x".join(map(str, shape)),
        dtype=dtype,
        variants={"torch": partial(run, torch_add_norm), "tapelm": partial(run, tapelm_add_norm)},
        bound="copy",
        # x, residual, r, y; grad, grad_r, r, dresidual and, if it differs from that, dx
        work=(9 if p else 8) * x.numel() * x.element_size(),
        agree=partial(same_rate, p) if p else agree_in_float32(dtype, partial(run, torch_add_norm), shape[0]),
    )

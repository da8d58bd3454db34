"""The table of ops a GPT calls: "plain" is PyTorch as the original project wrote it, "optimized" tapelm.

Switching the table changes which functions run and nothing else: parameters, initial weights and data order
stay.
Shapes: B windows, H heads, T queries, S keys, D head width, C model width, N = B*T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.cli import UserError

ParameterGroups = list[dict[str, Any]]


@dataclass(frozen=True)
class Ops:
    """The functions a model and its training loop get their arithmetic from."""

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """Causal. q (B, H, T, D) at the last T positions of k and v (B, H, S, D), the dropout probability of the
    weights -> (B, H, T, D)."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """x (..., C), weight (C,), bias (C,), eps -> (..., C)."""
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
    """x, residual (..., C), weight, bias (C,), eps, p -> (layer_norm(r), r), r = residual + dropout(x)."""
    embedding: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """ids (B, T), tokens (V, C), positions (T.., C), p -> dropout(tokens[ids] + positions), (B, T, C)."""
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """x (..., C), weight and bias to 4C, those back to C -> linear(tanh-GELU(linear(x))), (..., C)."""
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]
    """hidden (N, C), head weight (V, C), targets (N,) -> mean loss in float32, a scalar."""
    adamw: Callable[..., torch.optim.Optimizer]
    """(groups, lr=, betas=, eps=, max_grad_norm=) -> an optimizer whose step() clips and sets `grad_norm`."""


def load_ops(name: Literal["plain", "optimized"]) -> Ops:
    """The table called `name`. Only "optimized" imports the tapelm ops."""
    return PLAIN if name == "plain" else _optimized()


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`Ops.attention`, masked."""
    queries, keys = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    if queries > 1:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(diagonal=keys - queries)
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
    return weights @ v


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(r), r) with r = residual + dropout(x), all (..., C)."""
    r = residual + F.dropout(x, dropout_p)
    return F.layer_norm(r, r.shape[-1:], weight, bias, eps), r


class ClippedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, clipped before every step as training loops do."""

    def __init__(
        self,
        groups: ParameterGroups,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        max_grad_norm: float,
        fused: bool = False,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=fused or None)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | float = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        return super().step(closure)


class GeluLinear(torch.autograd.Function):
    """linear(bias_gelu(h, bias), weight, out_bias) of tapelm that keeps h alone for the backward.

    There GELU is computed again: about 1% of a training step's time for a twentieth of its memory.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor) -> Tensor:
        import tapelm

        ctx.save_for_backward(h, bias, weight)
        return tapelm.linear(tapelm.bias_gelu(h, bias), weight, out_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        h, bias, weight = ctx.saved_tensors
        hidden = torch.ops.tapelm.bias_gelu_forward(h, bias)
        dhidden, dweight, dout_bias = torch.ops.tapelm.linear_backward(grad, hidden, weight, True)
        return *torch.ops.tapelm.bias_gelu_backward(dhidden, h, bias), dweight, dout_bias


def gelu_linear(h: Tensor, bias: Tensor, weight: Tensor, out_bias: Tensor) -> Tensor:
    """linear(tanh-GELU(h + bias), weight, out_bias); h (..., N), weight (M, N) -> (..., M)."""
    import tapelm

    if torch.is_grad_enabled() and not torch.is_autocast_enabled(h.device.type):
        return GeluLinear.apply(h, bias, weight, out_bias)
    return tapelm.linear(tapelm.bias_gelu(h, bias), weight, out_bias)


PLAIN = Ops(
    name="plain",
    attention=causal_attention,
    layer_norm=lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    add_norm=add_layer_norm,
    embedding=lambda ids, tokens, positions, p: F.dropout(
        F.embedding(ids, tokens) + positions[: ids.shape[-1]], p
    ),
    linear=F.linear,
    mlp=lambda x, up, up_bias, down, down_bias: F.linear(
        F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias
    ),
    cross_entropy=lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets),
    adamw=ClippedAdamW,
)


def _optimized() -> Ops:
    try:
        import tapelm
    except ImportError as error:
        raise UserError(f"--kernels optimized needs the tapelm extension (make setup): {error}") from error

    return Ops(
        name="optimized",
        attention=lambda q, k, v, dropout_p: tapelm.attention(q, k, v, causal=True, dropout_p=dropout_p),
        layer_norm=tapelm.layer_norm,
        add_norm=tapelm.add_layer_norm,
        embedding=tapelm.embedding,
        linear=tapelm.linear,
        mlp=lambda x, up, up_bias, down, down_bias: gelu_linear(
            tapelm.linear(x, up), up_bias, down, down_bias
        ),
        cross_entropy=tapelm.linear_cross_entropy,
        adamw=tapelm.AdamW,
    )

"""Every public op on a few rows, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tapelm

WIDTH = 32


@dataclass(frozen=True)
class OpCase:
    """`inputs(rows)` gives tensors of which `rows` is a size."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[int], tuple[Tensor, ...]]
    frozen: tuple[int, ...] = ()
    """Inputs of floating point that have no gradient."""

    def leaves(self, rows: int) -> list[Tensor]:
        """The inputs, those that have a gradient requiring it."""
        return [
            x.clone().requires_grad_(x.is_floating_point() and i not in self.frozen)
            for i, x in enumerate(self.inputs(rows))
        ]

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.op(*inputs)
        return found if isinstance(found, tuple) else (found,)


def made(*shape: int) -> Tensor:
    """Standard normal numbers that depend on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(count: int, limit: int) -> Tensor:
    return torch.randint(limit, (2, count), generator=torch.Generator().manual_seed(count))


def _rows(*weights: Tensor, activations: int = 1) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda rows: (*(made(2, rows, WIDTH) + i for i in range(activations)), *weights)


def _heads(rows: int) -> tuple[Tensor, ...]:
    return made(2, 4, rows, 16), made(2, 2, rows, 16), made(2, 2, rows, 16) + 1


def _documents(rows: int) -> tuple[Tensor, ...]:
    return *_heads(rows), (torch.arange(rows) * 2 // rows).expand(2, rows).to(torch.int32).contiguous()


QUANTIZED = tapelm.nf4_quantize(made(24, 2 * WIDTH))
VECTOR, BIAS = made(WIDTH), made(WIDTH) + 1
OP_CASES: dict[str, OpCase] = {
    "layer_norm": OpCase(tapelm.layer_norm, _rows(VECTOR, BIAS)),
    "rms_norm": OpCase(tapelm.rms_norm, _rows(VECTOR)),
    "add_layer_norm": OpCase(tapelm.add_layer_norm, _rows(VECTOR, BIAS, activations=2)),
    "add_rms_norm": OpCase(tapelm.add_rms_norm, _rows(VECTOR, activations=2)),
    "bias_gelu": OpCase(tapelm.bias_gelu, _rows(VECTOR)),
    "swiglu": OpCase(tapelm.swiglu, _rows(activations=2)),
    "dropout": OpCase(lambda x: tapelm.dropout(x, 0.5), _rows()),
    "linear": OpCase(tapelm.linear, _rows(made(24, WIDTH), made(24))),
    "attention": OpCase(tapelm.attention, _heads),
    "attention of documents": OpCase(
        lambda q, k, v, documents: tapelm.attention(q, k, v, document_ids=documents), _documents
    ),
    "rope": OpCase(
        tapelm.rope, lambda rows: (*_heads(rows)[:2], made(rows, 16).cos(), made(rows, 16).sin()), (2, 3)
    ),
    "embedding": OpCase(tapelm.embedding, lambda rows: (ids(rows, 50), made(50, WIDTH), made(64, WIDTH))),
    "linear_cross_entropy": OpCase(
        lambda hidden, weight, targets: tapelm.linear_cross_entropy(hidden, weight, targets),
        lambda rows: (made(2 * rows, WIDTH), made(50, WIDTH), ids(rows, 50).flatten()),
    ),
    "lora_linear": OpCase(
        lambda x, weight, a, b: tapelm.lora_linear(x, weight, a, b, 2.0),
        _rows(made(24, WIDTH), made(4, WIDTH), made(24, 4)),
        (1,),
    ),
    "lora_linear of NF4": OpCase(
        lambda x, a, b: tapelm.lora_linear(x, QUANTIZED, a, b, 2.0),
        lambda rows: (made(2, rows, 2 * WIDTH), made(4, 2 * WIDTH), made(24, 4)),
    ),
}

"""What is no tensor is a TypeError that names the argument, in every op and also under autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import tapelm


def _floats(*shape: int) -> Tensor:
    return torch.zeros(shape)


ROWS, VECTOR, TABLE = _floats(2, 8), _floats(8), _floats(4, 8)
HEADS = _floats(1, 2, 4, 8)
OPS: dict[Callable[..., Any], dict[str, Any]] = {
    tapelm.add_layer_norm: {"x": ROWS, "residual": ROWS, "weight": VECTOR, "bias": VECTOR},
    tapelm.add_rms_norm: {"x": ROWS, "residual": ROWS, "weight": VECTOR},
    tapelm.attention: {"q": HEADS, "k": HEADS, "v": HEADS, "document_ids": torch.zeros(1, 4).int()},
    tapelm.bias_gelu: {"x": ROWS, "bias": VECTOR},
    tapelm.dropout: {"x": ROWS},
    tapelm.embedding: {"ids": torch.zeros(4, dtype=torch.int64), "tokens": TABLE, "positions": TABLE},
    tapelm.layer_norm: {"x": ROWS, "weight": VECTOR, "bias": VECTOR},
    tapelm.linear: {"x": ROWS, "weight": TABLE, "bias": _floats(4)},
    tapelm.linear_cross_entropy: {
        "hidden": ROWS, "weight": TABLE, "targets": torch.zeros(2, dtype=torch.int64), "bias": _floats(4),
    },
    tapelm.lora_linear: {"x": ROWS, "weight": TABLE, "a": ROWS, "b": _floats(4, 2)},
    tapelm.nf4_quantize: {"w": ROWS},
    tapelm.nf4_dequantize: {"q": tapelm.nf4_quantize(ROWS)},
    tapelm.rms_norm: {"x": ROWS, "weight": VECTOR},
    tapelm.rope: {"q": HEADS, "k": HEADS, "cos": TABLE, "sin": TABLE},
    tapelm.swiglu: {"gate": ROWS, "up": ROWS},
}  # fmt: skip
OTHERS = {
    tapelm.dropout: {"p": 0.0},
    tapelm.lora_linear: {"scaling": 1.0},
}
MAY_BE_NONE = {
    (tapelm.attention, "document_ids"),
    (tapelm.linear, "bias"),
    (tapelm.linear_cross_entropy, "bias"),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("op,name", [(op, name) for op, tensors in OPS.items() for name in tensors])
def test_what_is_no_tensor_is_named(op: Callable[..., Any], name: str, mixed: bool) -> None:
    arguments = OPS[op] | OTHERS.get(op, {})
    with torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
        op(**arguments)
        for wrong in ([1.0], None):
            if wrong is None and (op, name) in MAY_BE_NONE:
                continue
            with pytest.raises(TypeError, match=rf"\b{name} is (of type {type(wrong).__name__}|None)\b"):
                op(**arguments | {name: wrong})

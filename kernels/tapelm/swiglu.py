"""The gated activation of Llama's feed-forward layer, silu(gate) * up, in one pass.

    y = gate * s * up                      s = sigmoid(gate)
    dgate = grad * up * s * (1 + gate * (1 - s))        dup = grad * gate * s

[Shazeer, "GLU variants improve transformer", 2020]

Shapes: gate, up, y, grad, dgate, dup (...), all of one dtype. Arithmetic is in float32.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import (
    autocast,
    check_tensors,
    register_cuda,
    register_fake,
)
from ._tuning import choose


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition in plain PyTorch, any dtype."""
    return torch.nn.functional.silu(gate) * up


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    # First grad * s: grad * up and grad * gate may overflow where s is 0.
    scaled = grad * s
    tl.store(dup_ptr + at, (scaled * gate).to(dup_ptr.dtype.element_ty), mask=at < numel)
    dgate = scaled * up * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=at < numel)


TILE = {"BLOCK": 2048, "num_warps": 4}  # elements of a program


@register_cuda("swiglu_forward", gate="*S", up="*S")
def launch_swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Triton launch of ``tapelm::swiglu_forward``."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        tile = choose("swiglu_forward", y.device, (y.itemsize,), TILE)
        grid = (triton.cdiv(y.numel(), tile["BLOCK"]),)
        swiglu_forward_kernel[grid](gate, up, y, y.numel(), **tile)
    return y


@register_cuda("swiglu_backward", grad="*S", gate="*S", up="*S")
def launch_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Triton launch of ``tapelm::swiglu_backward``."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    if gate.numel():
        tile = choose("swiglu_backward", gate.device, (gate.itemsize,), TILE)
        grid = (triton.cdiv(gate.numel(), tile["BLOCK"]),)
        swiglu_backward_kernel[grid](grad, gate, up, dgate, dup, gate.numel(), **tile)
    return dgate, dup


@register_fake("swiglu_forward")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@register_fake("swiglu_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: one shape (...) and dtype; float32 or bfloat16, on CUDA also float16. Under autocast both
            are cast to its dtype.

    Returns:
        (...), contiguous, dtype of the inputs.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: shapes or devices differ.
    """
    gate, up = autocast(gate, up)
    check_tensors("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: up is {tuple(up.shape)}; it needs the shape of gate, {tuple(gate.shape)}.")
    return torch.ops.tapelm.swiglu_forward.default(gate, up)

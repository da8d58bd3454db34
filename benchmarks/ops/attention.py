"""Attention, forward and backward, against SDPA; `python -m benchmarks.ops.attention` measures its grid.

A shape is BxHxTxD, causal unless it says "full". SDPA runs without dropout also where we run with it, as with
dropout it would leave its fused kernel. Decoding, forward alone, has T queries at the end of "of HxS" keys,
on GPUs also of as many as models of 8 billion parameters keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import tapelm
from benchmarks import harness, sweeps
from benchmarks.harness import Case, close
from benchmarks.kept_memory import restart


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    B: int
    H: int
    T: int
    D: int
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    dropout_p: float = 0.0

    def __str__(self) -> str:
        extra = ("" if self.causal else " full") + (f" p={self.dropout_p}" if self.dropout_p else "")
        return f"{self.B}x{self.H}x{self.T}x{self.D}{extra}"


SETTINGS = (
    Setting(16, 8, 256, 64, dropout_p=0.1),  # the `seed` preset
    Setting(16, 8, 256, 64),
    Setting(4, 8, 1024, 64),
    Setting(1, 8, 4096, 64),
    Setting(4, 4, 512, 128),
    Setting(8, 8, 64, 32),
    Setting(1, 1, 2048, 64),
    Setting(4, 8, 512, 64, causal=False),
    Setting(16, 8, 256, 64, torch.float32),
    Setting(4, 8, 1024, 64, torch.float32),
    Setting(1, 8, 4096, 64, torch.float32),
)
GRID = tuple(
    Setting(max(1, 1024 // T), 4, T, D, dtype, causal)
    for dtype in (torch.bfloat16, torch.float32)
    for causal in (True, False)
    for T in (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    for D in (32, 64, 96, 128)
)


@dataclass(frozen=True)
class Decoding:
    """T tokens that continue S - T cached ones, of B sequences."""

    heads: int
    key_heads: int
    T: int
    S: int
    dtype: torch.dtype
    D: int = 64
    B: int = 1

    def __str__(self) -> str:
        return f"{self.B}x{self.heads}x{self.T}x{self.D} of {self.key_heads}x{self.S}"


DECODED = tuple(
    Decoding(heads, key_heads, T, S, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for heads, key_heads in ((9, 3), (8, 8))
    for T, S in ((1, 256), (1, 1024), (1, 4096), (4, 4096))
)
DECODED_ON_GPU = (
    *(each for each in DECODED if each.S == 4096 and each.dtype == torch.bfloat16),
    *(
        Decoding(32, 8, T, S, torch.bfloat16, 128, B)
        for B, T, S in ((1, 1, 4096), (1, 1, 32768), (1, 8, 32768), (8, 1, 8192), (32, 1, 4096))
    ),
)


def cases(device: torch.device, settings: Sequence[Setting] | None = None) -> list[Callable[[], Case]]:
    """Of these settings; of all that are published, decoding too, where none are given."""
    steps = [partial(case, device, setting) for setting in settings or SETTINGS]
    decoded = DECODED_ON_GPU if device.type == "cuda" else DECODED
    return steps if settings else steps + [partial(decode_case, device, each) for each in decoded]


def agree(dropout_p: float, dtype: torch.dtype) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """With dropout the results differ at random; tests/kernels/test_attention.py knows the mask."""
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return (lambda ours, expected: None) if dropout_p else close(tolerance, tolerance)


def case(device: torch.device, setting: Setting) -> Case:
    B, H, T, D = setting.B, setting.H, setting.T, setting.D
    generator = torch.Generator().manual_seed(0)
    # (B, T, H, D) in memory, as the projections of a model leave it.
    q, k, v, grad = (
        torch.randn(B, T, H, D, generator=generator).to(device, setting.dtype).transpose(1, 2)
        for _ in range(4)
    )

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    ours = partial(tapelm.attention, causal=setting.causal, dropout_p=setting.dropout_p)
    return Case(
        subject="attention fwd+bwd",
        shape=str(setting),
        dtype=setting.dtype,
        variants={
            "sdpa": partial(run, partial(F.scaled_dot_product_attention, is_causal=setting.causal)),
            "tapelm": partial(run, ours),
        },
        bound="gemm",
        # 2 + 5 products of T x T x D (half of it when causal), two flops each
        work=(7 if setting.causal else 14) * B * H * T * T * D,
        agree=agree(setting.dropout_p, setting.dtype),
    )


def decode_case(device: torch.device, of: Decoding) -> Case:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(of.B, of.T, of.heads, of.D, generator=generator).to(device, of.dtype).transpose(1, 2)
    k, v = (
        torch.randn(of.B, of.key_heads, of.S, of.D, generator=generator).to(device, of.dtype)
        for _ in range(2)
    )
    # SDPA would stand the queries at the first positions; one query sees all keys.
    visible = torch.ones(of.T, of.S, dtype=torch.bool, device=device).tril(of.S - of.T)
    sdpa = partial(
        F.scaled_dot_product_attention,
        attn_mask=visible if of.T > 1 else None,
        enable_gqa=of.heads != of.key_heads,
    )

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [function(q, k, v)]

    return Case(
        subject="attention fwd",
        shape=str(of),
        dtype=of.dtype,
        variants={"sdpa": partial(run, sdpa), "tapelm": partial(run, tapelm.attention)},
        bound="copy",
        work=k.nbytes + v.nbytes,
        agree=agree(0.0, of.dtype),
    )


if __name__ == "__main__":
    restart()
    device = torch.device("cpu")
    rows = sweeps.measure_all(cases(device, GRID), device, rounds=5)
    harness.report("python -m benchmarks.ops.attention", rows, device)

"""One clipped AdamW step over the tensors of a GPT, against torch.optim.AdamW plain and fused.

With bfloat16 parameters the peers train float32 ones and then write their bfloat16 copies, as mixed precision
without our optimizer has to. 200 tensors of 64 elements measure what a tensor costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import tapelm
from benchmarks.harness import Case, close

WIDTHS = (512, 768)  # 6 blocks each: 19 and 43 million parameters
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def cases(device: torch.device) -> list[Callable[[], Case]]:
    dtypes = (torch.float32, torch.bfloat16)
    large = [partial(case, device, dtype, gpt_shapes(width)) for dtype in dtypes for width in WIDTHS]
    return [*large, partial(case, device, torch.float32, 200 * [(64,)])]


def gpt_shapes(width: int) -> list[tuple[int, ...]]:
    matrices = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return 6 * [*matrices, (width,), (width,)]


def stepper(
    build: Callable[..., torch.optim.Optimizer], parameters: list[torch.Tensor], *, clip: bool, copy: bool
) -> Callable[[], list[torch.Tensor]]:
    """One step, preceded by clipping and followed by bfloat16 copies where the optimizer does not do them."""
    for parameter in parameters:
        parameter.requires_grad_().grad = 0.01 * parameter.detach()
    optimizer = build(parameters, **OPTIONS)
    copies = [parameter.detach().bfloat16() for parameter in parameters] if copy else []

    def step() -> list[torch.Tensor]:
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for half, parameter in zip(copies, parameters, strict=False):
            half.copy_(parameter.detach())
        return copies or [parameter.detach() for parameter in parameters]

    return step


def case(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> Case:
    def tensors(kind: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(device, dtype).to(kind) for shape in shapes]

    half = dtype == torch.bfloat16

    def peer(**how: bool) -> Callable[[], list[torch.Tensor]]:
        return stepper(partial(torch.optim.AdamW, **how), tensors(torch.float32), clip=True, copy=half)

    def ours(**how: int) -> Callable[[], list[torch.Tensor]]:
        return stepper(
            partial(tapelm.AdamW, max_grad_norm=1.0, **how), tensors(dtype), clip=False, copy=False
        )

    count = sum(t.numel() for t in tensors(dtype))
    variants = {"torch": peer(), "torch fused": peer(fused=True), "tapelm": ours()}
    if count > 1e6:
        variants["tapelm 8-bit"] = ours(state_bits=8)
    if half:
        variants["tapelm stochastic"] = ours(stochastic_seed=0)
    return Case(
        subject="adamw clip+step",
        shape=f"{count / 1e6:.0f}M" if count > 1e6 else f"{len(shapes)} x {shapes[0][0]}",
        dtype=dtype,
        variants=variants,
        bound="copy",
        # The gradient twice (norm, update); moments and master or parameter read and written; the copy.
        work=(30 if half else 32) * count,
        agree=close(1e-2, 1e-3) if half else close(1e-4, 1e-4),
    )

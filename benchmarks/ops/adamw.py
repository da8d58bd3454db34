"""One clipped AdamW step over the tensors of a GPT, against torch.optim.AdamW plain and fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import tapelm
from benchmarks.harness import Case, close

WIDTHS = (512, 768)  # 6 blocks each: 19 and 43 million parameters
OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def cases(device: torch.device) -> list[Callable[[], Case]]:
    return [partial(case, device, width) for width in WIDTHS]


def tensors(width: int, device: torch.device) -> list[torch.Tensor]:
    shapes = 6 * [
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
        (width,),
        (width,),
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def case(device: torch.device, width: int) -> Case:
    def stepper(build: Callable[..., torch.optim.Optimizer], clip: bool) -> Callable[[], list[torch.Tensor]]:
        parameters = [t.requires_grad_() for t in tensors(width, device)]
        for parameter in parameters:
            parameter.grad = 0.01 * parameter.detach()
        optimizer = build(parameters, **OPTIONS)

        def step() -> list[torch.Tensor]:
            if clip:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            return [parameter.detach() for parameter in parameters]

        return step

    count = sum(t.numel() for t in tensors(width, device))
    return Case(
        subject="adamw clip+step",
        shape=f"{count / 1e6:.0f}M",
        dtype=torch.float32,
        variants={
            "torch": stepper(torch.optim.AdamW, clip=True),
            "torch fused": stepper(partial(torch.optim.AdamW, fused=True), clip=True),
            "tapelm": stepper(partial(tapelm.AdamW, max_grad_norm=1.0), clip=False),
        },
        bound="copy",
        work=32 * count,  # gradient twice (norm, update); parameter and two moments read and written
        agree=close(1e-4, 1e-5),
    )

"""What a training step is made of, without the run around it: model, optimizer, autocast, losses."""

from __future__ import annotations

import contextlib
import hashlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from gpt import parallel
from gpt.config import ModelConfig, TrainConfig
from gpt.model import GPT
from gpt.ops import Ops, load_ops
from gpt.parallel import Ranks
from tapelm.loader import Batch


def model_and_optimizer(
    config: TrainConfig, shape: ModelConfig, precision: str, device: torch.device, ops: Ops | None = None,
    *, sharded: bool = False, **adamw_options: Any,
) -> tuple[GPT, torch.optim.Optimizer]:  # fmt: skip
    """What a run starts from: in bf16, too, its float32 masters are the initial weights, unrounded.

    `ops` takes the place of the table that config.kernels names; `sharded` cuts the model among all ranks.
    """
    ops = ops or load_ops(config.kernels)
    model = GPT(shape, ops, activation_checkpointing=config.activation_checkpointing).initialize(config.seed)
    masters = [parameter.detach().clone() for parameter in model.parameters()] if precision == "bf16" else []
    model.to(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    if sharded:
        parallel.shard(model)  # block by block to the device, which need not hold them all
    else:
        model.to(device)
    optimizer = ops.adamw(
        model.parameter_groups(config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        max_grad_norm=config.max_grad_norm,
        **adamw_options,
    )
    for parameter, master in zip(model.parameters(), masters, strict=False):
        optimizer.set_master(parameter, parallel.as_cut(master, parameter))  # type: ignore[attr-defined]
    return model, optimizer


def norm_of(optimizer: torch.optim.Optimizer) -> float:
    """The gradients' norm before clipping, of the last step."""
    return float(parallel.whole(optimizer.grad_norm))  # type: ignore[attr-defined]


def validation_loss(model: GPT, batches: Sequence[Batch], ranks: Ranks, precision: str) -> float:
    """Mean loss of the batches. Ranks share them; as many forward passes on each, which FSDP needs."""
    model.eval()
    losses = []
    with torch.no_grad(), autocast(ranks.device, precision):
        for first in range(0, len(batches), ranks.size):
            index = first + ranks.rank
            batch = batches[index % len(batches)]
            loss = model(batch.inputs, batch.targets).item()
            losses += [loss] if index < len(batches) else []
    model.train()
    return statistics.fmean(loss for share in ranks.gather(losses) for loss in share)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-autocast")


def chain_sha256(previous: str, ids: torch.Tensor) -> str:
    """SHA-256 of the previous digest and these ids (B, T): unlike a running hash it fits a checkpoint."""
    return hashlib.sha256(bytes.fromhex(previous) + ids.cpu().contiguous().numpy().tobytes()).hexdigest()

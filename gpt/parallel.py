"""Several processes, one run: torchrun --nproc-per-node 2 -m gpt.train ... [--parallel fsdp]

Each process ("rank") takes its own windows of a batch and its own random numbers; gradients are averaged.
With "ddp" every rank holds the whole model; with "fsdp" (FSDP2) parameters, gradients and optimizer states
are cut into shards, and a block's parameters are whole only while it is computed. Checkpoints hold whole
tensors either way, written by rank 0. GPUs talk by NCCL, CPUs by gloo.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt.cli import UserError
from gpt.hardware import pick_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. Every method but `leads` is to be called by all."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine."""

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.SUM) / self.size

    def largest(self, value: float) -> float:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: float, operation: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.item()

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, in their order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def of_leader(self, find: Callable[[], Value]) -> Value:
        """What `find` returns on rank 0, where alone it is called."""
        found: list[Any] = [find() if self.leads else None]
        if self.size > 1:
            dist.broadcast_object_list(found, src=0, device=self.device)
        return found[0]


@contextlib.contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, each with a GPU of its own if there are any; else this one."""
    device = pick_device(device_name)
    if not dist.is_torchelastic_launched():
        yield Ranks(device)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"--device {device_name} is one GPU: with torchrun say --device cuda")
        device = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Ranks(device, dist.get_rank(), dist.get_world_size(), local_rank)
    dist.destroy_process_group()  # not after an error: the others may be waiting, until torchrun ends them


def several_processes() -> bool:
    """Whether torchrun has started more than this process."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def shard(model: Any) -> None:
    """Cuts a GPT's parameters among all ranks, in place: a unit for each block, one for what is left."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True)


def averaging(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` whose backward pass averages the gradients over all ranks (DDP)."""
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def keeping_gradients(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Backward passes in which ranks add up gradients of their own, as a later one will average them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def as_cut(whole: Tensor, like: Any) -> Tensor:
    """The shards of `whole` where `like`, of the same shape, has been cut by `shard`; else `whole`."""
    if not hasattr(like, "device_mesh") or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: Any) -> Tensor:
    """All shards of `tensor` put together, in memory of the CPU; to be called by all ranks."""
    return tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor

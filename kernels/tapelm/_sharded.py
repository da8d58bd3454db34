"""Parameters that a DTensor program such as FSDP2 has cut into shards. AdamW works on the shards.

A shard is the part of a tensor that this rank holds; a DTensor's own shape is that of the whole.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor. Does not import what only a program that has one needs."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_of(tensor: Any) -> Tensor:
    """The rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def as_shard(part: Tensor, whole: Any) -> Tensor:
    """``part`` as the rank's part of a DTensor that is cut as ``whole`` is; itself where that is none."""
    if not is_sharded(whole):
        return part
    return type(whole).from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def norm_over_ranks(norm: Tensor, whole: Any) -> Tensor:
    """The L2 norm () over all ranks from that of each rank's parts, which are cut as ``whole`` is."""
    square = norm.square()
    for dimension, placement in enumerate(whole.placements):
        if placement.is_partial():
            raise ValueError(
                f"AdamW: a gradient has the placement {placement}; redistribute it to Shard or Replicate."
            )
        if placement.is_shard():
            torch.distributed.all_reduce(square, group=whole.device_mesh.get_group(dimension))
    return square.sqrt()

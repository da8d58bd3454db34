"""How the batches of a TokenLoader come to a device: as they are, copied, or assembled there by csrc/cuda."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from tapelm import _text


class Batch(NamedTuple):
    """One training step of one rank.

    inputs: (B, T) int64. targets: (B, T) int64, inputs one token later, or -100 where there is none.
    document_ids: (B, T) int32, the documents of each row counted from 0; an end-of-text token belongs to the
    document that it ends.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor


class BatchSource(Protocol):
    """The batch of any step; steps in order are fast."""

    loader: _text.Loader

    def next(self, step: int) -> Batch: ...


def batch_source(
    device: torch.device, open_loader: Callable[[bool], _text.Loader], *, end_of_text: int, packed: bool
) -> BatchSource:
    """The source for `device`; `open_loader(rows)` opens the shards.

    Raises:
        ValueError: from `open_loader`, or a CUDA device where PyTorch sees none.
    """
    if device.type == "cpu":
        return HostBatches(open_loader(False))
    if device.type != "cuda":
        return CopiedBatches(open_loader(False), device)
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {device} cannot be used: PyTorch {torch.__version__} sees no CUDA device here; "
            'pass device="cpu", or install a CUDA build of PyTorch and the driver'
        )
    if importlib.util.find_spec("tapelm._cuda") is None:
        return PinnedBatches(open_loader(False), device)
    return AssembledBatches(open_loader(True), device, end_of_text=end_of_text, packed=packed)


class HostBatches:
    """Batches in the memory that the prefetch thread wrote."""

    def __init__(self, loader: _text.Loader) -> None:
        self.loader = loader

    def next(self, step: int) -> Batch:
        return Batch(*map(torch.from_numpy, self.loader.next(step)))


class CopiedBatches(HostBatches):
    """Plain copies to a device that is not CUDA."""

    def __init__(self, loader: _text.Loader, device: torch.device) -> None:
        super().__init__(loader)
        self._device = device

    def next(self, step: int) -> Batch:
        return Batch(*(tensor.to(self._device) for tensor in super().next(step)))


class PinnedBatches(HostBatches):
    """Two pinned batches in turn: one is on its way to the GPU while the host writes the other."""

    def __init__(self, loader: _text.Loader, device: torch.device) -> None:
        super().__init__(loader)
        self._device = device
        self._slots: list[Batch] = []
        self._copied = (torch.cuda.Event(), torch.cuda.Event())

    def next(self, step: int) -> Batch:
        batch = super().next(step)
        if not self._slots:
            self._slots = [Batch(*(torch.empty_like(t, pin_memory=True) for t in batch)) for _ in range(2)]
        slot = step % 2
        self._copied[slot].synchronize()  # of the copy two steps ago
        for pinned, tensor in zip(self._slots[slot], batch, strict=True):
            pinned.copy_(tensor)
        on_device = Batch(*(pinned.to(self._device, non_blocking=True) for pinned in self._slots[slot]))
        self._copied[slot].record(torch.cuda.current_stream(self._device))
        return on_device


class AssembledBatches:
    """Stored tokens travel (2 or 4 bytes each instead of 20); the GPU makes the batch of them."""

    def __init__(self, loader: _text.Loader, device: torch.device, *, end_of_text: int, packed: bool) -> None:
        from tapelm import _cuda  # pyright: ignore[reportMissingModuleSource]  # built only where nvcc and a CUDA build of PyTorch are

        self.loader = loader
        self._device = device
        self._stage: _cuda.Stage | None = None
        self._new_stage = _cuda.Stage
        self._rule = (end_of_text, packed)

    def next(self, step: int) -> Batch:
        rows, lengths = self.loader.next(step)
        size = (rows.shape[0], rows.shape[1] - 1)
        with torch.cuda.device(self._device):
            stage = self._stage or self._new_stage(*size, rows.itemsize, *self._rule)
            self._stage = stage
            batch = Batch(
                torch.empty(size, dtype=torch.int64, device=self._device),
                torch.empty(size, dtype=torch.int64, device=self._device),
                torch.empty(size, dtype=torch.int32, device=self._device),
            )
            queue = torch.cuda.current_stream(self._device).cuda_stream
            inputs, targets, document_ids = (tensor.data_ptr() for tensor in batch)
            stage.assemble(rows, lengths, inputs, targets, document_ids, queue)
        return batch

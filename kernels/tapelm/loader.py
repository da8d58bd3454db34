"""Training batches made of token shards; the Python face of csrc/text/loader.h."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tapelm import _text
from tapelm.shards import read_manifest


class Batch(NamedTuple):
    """One training step of one rank.

    inputs: (B, T) int64. targets: (B, T) int64, inputs one token later. document_ids: (B, T) int32, the
    documents of each row counted from 0; an end-of-text token belongs to the document that it ends.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor


class TokenLoader:
    """Endless batches from a shard directory, shuffled anew in every epoch.

    Block w is tokens [wT, wT + T) of the sequence, with targets one token later; blocks do not overlap and
    may cross documents and shards. The order is a computed permutation that depends on the seed and the epoch
    alone. Step s of an epoch takes the next world_size x B blocks of it, B for each rank, so that the ranks
    together see every block once per epoch, except the last (number of blocks mod world_size x B) ones: these
    are left out, others in each epoch, and all ranks have the same number of batches. Memory: the shards are
    mapped, not read.

    Attributes:
        epoch: epochs completed. tokens, windows, vocab_size, end_of_text: of the shards.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str],
        batch_size: int,
        seq_len: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open a directory written by `write_shards`.

        Raises:
            ValueError: damaged or missing shards (named), a corpus smaller than one block or one batch of all
                ranks, arguments out of range. Contents are not hashed: see `verify_shards`.
        """
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
            if not 0 < value < 2**31:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
        directory = Path(shards)
        manifest, fingerprint = read_manifest(directory)
        paths = [directory / entry["file"] for entry in manifest["shards"]]
        try:
            self._loader = _text.Loader(
                [str(path) for path in paths],
                manifest["end_of_text"],
                batch_size,
                seq_len,
                seed,
                rank,
                world_size,
            )
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        for path, header, entry in zip(paths, self._loader.headers, manifest["shards"], strict=True):
            found = (header.tokens, header.documents, header.vocab_size, header.end_of_text)
            stated = (entry["tokens"], entry["documents"], manifest["vocab_size"], manifest["end_of_text"])
            if found != stated:
                raise ValueError(
                    f"shard {path} does not belong to its manifest: "
                    f"(tokens, documents, vocab_size, end_of_text) are {found}, the manifest says {stated}"
                )
        self.tokens: int = self._loader.tokens
        self.windows: int = self._loader.windows
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_text: int = manifest["end_of_text"]
        self._device = torch.device(device)
        self._shape = (batch_size, seq_len)
        self._identity = {
            "fingerprint": fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "world_size": world_size,
        }
        self._step = 0

    def __len__(self) -> int:
        """Batches per epoch, the same for every rank."""
        return self._loader.steps_per_epoch

    @property
    def epoch(self) -> int:
        return self._step // len(self)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # A fresh buffer per batch: a pinned one must not be refilled before its copy to the device has ended.
        pinned = self._device.type == "cuda"
        batch = Batch(
            torch.empty(self._shape, dtype=torch.int64, pin_memory=pinned),
            torch.empty(self._shape, dtype=torch.int64, pin_memory=pinned),
            torch.empty(self._shape, dtype=torch.int32, pin_memory=pinned),
        )
        self._loader.fill(self._step, *(tensor.numpy() for tensor in batch))
        self._step += 1
        if self._device.type == "cpu":
            return batch
        return Batch(*(tensor.to(self._device, non_blocking=pinned) for tensor in batch))

    def state_dict(self) -> dict[str, Any]:
        """Position (batches consumed per rank since the start) and what it belongs to; JSON-serializable."""
        return {**self._identity, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position in constant time, on any rank.

        Raises:
            ValueError: the state is of other shards, seed, batch_size, seq_len or world_size; the message
                says which.
        """
        for name, mine in self._identity.items():
            if name not in state or state[name] != mine:
                what = "shards (fingerprint)" if name == "fingerprint" else name
                raise ValueError(
                    f"state is of other {what}: it has {state.get(name)}, this loader has {mine}"
                )
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise ValueError(f"state has no valid step: {step!r}")
        self._step = step

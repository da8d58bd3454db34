"""Training batches made of token shards; the Python face of csrc/text/loader.h and prefetch.h."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from tapelm import _text
from tapelm._batches import Batch as Batch
from tapelm._batches import BatchSource, batch_source
from tapelm.shards import check_integers, read_manifest

ORDERS = {"shuffled": _text.SHUFFLED, "sequential": _text.SEQUENTIAL, "packed": _text.PACKED}


class TokenLoader:
    """Endless batches from a shard directory, prepared ahead by a thread in C++.

    order="shuffled": window w is tokens [wT, wT + T) of the sequence, with targets one token later;
    windows do not overlap and may cross documents and shards. The order is a computed permutation that
    depends on the seed and the epoch alone. order="sequential": the same windows as they come.
    order="packed": a window holds whole documents, each followed by no target (-100, the ignore_index
    of PyTorch's losses), documents longer than T are cut into full windows and a rest, and what no
    document fills is padding: end_of_text with target -100 and a document id of its own. Every token is
    an input once, and every token but the first of a document a target once. Packing is best-fit
    decreasing among some four million consecutive tokens; these groups, and the windows of each, are
    shuffled.

    Step s of an epoch takes the next world_size x B windows of the order, B for each rank, so that the
    ranks together see every window once per epoch, except the last (number of windows mod world_size x
    B) ones: these are left out (others in each epoch unless sequential), and all ranks have the same
    number of batches. Memory: the shards are mapped, not read, so that whoever shortens one of them in
    place ends the process by SIGBUS (`write_shards` and `encode_files` replace them instead); "packed"
    reads the document starts once and keeps 16 bytes per group.

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
        order: Literal["shuffled", "sequential", "packed"] = "shuffled",
    ) -> None:
        """Open a directory written by `write_shards` or `Tokenizer.encode_files`.

        Raises:
            TypeError: a number that is no integer.
            ValueError: damaged or missing shards (named), a corpus smaller than one window or one batch of
                all ranks, arguments out of range, a CUDA device where PyTorch sees none. Contents are not
                hashed: see `verify_shards`.
        """
        numbers = {"batch_size": batch_size, "seq_len": seq_len, "world_size": world_size}
        check_integers(**numbers, rank=rank, seed=seed)
        for name, value in numbers.items():
            if not 0 < value < 2**31:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in 0 .. 2**64 - 1, got {seed}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        directory = Path(shards)
        manifest, fingerprint = read_manifest(directory)
        paths = [directory / entry["file"] for entry in manifest["shards"]]
        arguments = (batch_size, seq_len, seed, rank, world_size, ORDERS[order])
        try:
            self._source: BatchSource = batch_source(
                torch.device(device),
                lambda rows: _text.Loader(
                    [str(path) for path in paths], manifest["end_of_text"], *arguments, rows
                ),
                end_of_text=manifest["end_of_text"],
                packed=order == "packed",
            )
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        self._loader = self._source.loader
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
        self._identity = {
            "fingerprint": fingerprint,
            "seed": int(seed),
            "batch_size": int(batch_size),
            "seq_len": int(seq_len),
            "world_size": int(world_size),
            "order": order,
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
        batch = self._source.next(self._step)
        self._step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position (batches consumed per rank since the start, whatever is prepared ahead) and what it
        belongs to; JSON-serializable."""
        return {**self._identity, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position in constant time, on any rank.

        Raises:
            ValueError: the state is of other shards, seed, batch_size, seq_len, world_size or order; the
                message says which.
        """
        if "fingerprint" not in state:
            raise ValueError(f"state is not what state_dict of a TokenLoader gives: it has {[*state]}")
        state = {"order": "shuffled", **state}  # saved when there was one order
        for name, mine in self._identity.items():
            if name not in state or state[name] != mine:
                what = "shards (fingerprint)" if name == "fingerprint" else name
                raise ValueError(
                    f"state is of other {what}: it has {state.get(name)}, this loader has {mine}"
                )
        step = state.get("step")
        if type(step) is not int or not 0 <= step < 2**63:
            raise ValueError(f"state has no valid step: {step!r}")
        self._step = step

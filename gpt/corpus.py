"""Reading a data directory written by `python -m data.prepare`: tokenizer, shards and documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.checkpoint import sha256_of
from gpt.cli import UserError
from gpt.config import TrainConfig
from gpt.parallel import Ranks
from tapelm import Tokenizer, TokenLoader
from tapelm.loader import Batch
from tapelm.shards import read_manifest, verify_shards

END_OF_TEXT = "<|endoftext|>"
SHARD_HEADER_BYTES = 64  # csrc/text/shards.h


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer with an <|endoftext|>. Raises UserError for a missing file or one of another kind."""
    if not path.is_file():
        raise UserError(f"{no_data(path.parent)} (there is no {path})")
    try:
        tokenizer = Tokenizer.load(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise UserError(f"{path} has no special token {END_OF_TEXT}: use the one data.prepare trains")
    return tokenizer


def no_data(data: Path) -> str:
    """What to do about a --data that is none."""
    if data.is_file():
        return f"{data} is a file: run python -m data.prepare --source files --input {data} --out DIR"
    what = "is no data directory" if data.exists() else "does not exist"
    return f"{data} {what}: name one of python -m data.prepare, or make it with --out {data}"


def open_loader(config: TrainConfig, ranks: Ranks) -> TokenLoader:
    """This rank's batches of train. Raises UserError when there are none, or too few tokens for a batch."""
    shards, size = config.data / "train", (config.batch_size, config.block_size)
    return _loader(shards, *size, ranks.device, seed=config.seed, rank=ranks.rank, world_size=ranks.size)


def _loader(
    shards: Path, batch_size: int, block_size: int, device: torch.device, **numbers: Any
) -> TokenLoader:
    if not (shards / "manifest.json").is_file():
        raise UserError(f"{no_data(shards.parent)} (there are no token shards in {shards})")
    try:
        read_manifest(shards)
    except ValueError as error:
        raise UserError(f"{error}: run python -m data.prepare again") from error
    try:
        return TokenLoader(shards, batch_size, block_size, device=device, **numbers)
    except ValueError as error:
        raise UserError(f"{error} (--batch-size, --block-size)") from error


def check_shards(data: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the shards of `data` are whole and their ids are those of `tokenizer`."""
    for split in ("train", "val"):
        try:
            vocab_size = verify_shards(data / split)["vocab_size"]
        except ValueError as error:
            raise UserError(f"{error}: run python -m data.prepare again") from error
        if vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{data / split} was encoded with {vocab_size} token ids, but {data / 'tokenizer.json'} has "
                f"{tokenizer.vocab_size}: run python -m data.prepare again"
            )
    card = data / "data_card.json"
    outputs = json.loads(card.read_text(encoding="utf-8"))["outputs"] if card.is_file() else {}
    for name in ("tokenizer.json", "train/manifest.json", "val/manifest.json"):
        made = outputs.get(name, {}).get("sha256")
        if made not in (None, sha256_of(data / name)):
            raise UserError(
                f"{data / name} is not the one that data.prepare made: run python -m data.prepare --force"
            )


def text_sha256(data: Path, split: str) -> str:
    """SHA-256 of a split's documents, whatever the tokenizer; of its shards where it has none (a tape)."""
    documents = data / "documents" / f"{split}.jsonl"
    return sha256_of(documents if documents.is_file() else data / split / "manifest.json")


def released(data: Path, split: str) -> tuple[str, str] | None:
    """First and last day, ISO, on which the documents of a split came out, as the data card has them; None
    where documents are split by hash and days say nothing."""
    path = data / "data_card.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    domains = card.get("splits", {}).get(split, {}).values()
    days = [(domain["first"], domain["last"]) for domain in domains if domain.get("first")]
    if not card.get("split_dates") or not days:
        return None
    return min(first for first, _ in days), max(last for _, last in days)


def not_out_of_sample(data: Path, split: str, trained_until: str | None) -> str | None:
    """What to say where a model was trained on text as late as a held-out split of `data`, or later."""
    span = None if split == "train" else released(data, split)
    if span is None or trained_until is None or trained_until < span[0]:
        return None
    return (
        f"warning: the model was trained on text released until {trained_until}, the {split} split of {data} "
        f"begins on {span[0]}: it may have seen what it is measured on"
    )


def fixed_batches(config: TrainConfig, ranks: Ranks) -> list[Batch]:
    """The validation batches of all ranks, eval_batches each: the same for all runs on this data with as many
    windows in them, and never one window twice."""
    shards, device = config.data / "val", ranks.device
    windows = _loader(shards, 1, config.block_size, device).windows
    loader = _loader(shards, min(config.batch_size, windows), config.block_size, device)
    return [next(loader) for _ in range(min(config.eval_batches * ranks.size, len(loader)))]


def text_bytes(tokenizer: Tokenizer, batches: list[Batch]) -> int:
    """UTF-8 bytes that the targets of `batches` spell, special tokens excluded."""
    special = torch.tensor(sorted(tokenizer.special_tokens.values()))
    targets = torch.cat([batch.targets.flatten() for batch in batches]).cpu()
    return len(tokenizer.decode_bytes(targets[~torch.isin(targets, special)].numpy()))


def token_arrays(shards: Path) -> Iterator[np.ndarray]:
    """The tokens of each shard, mapped, not read: (tokens,) little-endian uint16 or uint32.

    Raises UserError where `shards` is no shard directory.
    """
    try:
        manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
        for entry in manifest["shards"]:
            dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
            path, size = shards / entry["file"], entry["tokens"]
            yield np.memmap(path, dtype=dtype, mode="r", offset=SHARD_HEADER_BYTES, shape=(size,))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shards} holds no token shards: {error}") from error


def training_counts(shards: Path, vocab_size: int) -> np.ndarray:
    """How often each id occurs in `shards`: (vocab_size,) int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for ids in token_arrays(shards):
        of_shard = np.bincount(ids, minlength=vocab_size)
        if of_shard.size > vocab_size:
            raise UserError(f"{shards} holds ids beyond a vocabulary of {vocab_size}")
        counts += of_shard
    return counts


def read_domains(path: Path, max_bytes: int = 0) -> dict[str, list[str]]:
    """Texts of a documents file by source, the last of each cut where `max_bytes` (if not 0) end."""
    if not path.is_file():
        raise UserError(f"no {path}: run python -m data.prepare first")
    domains: dict[str, list[str]] = {}
    left: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                document = json.loads(line.decode())
                source, text = str(document["source"]), document["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}:{number}: not a document with text and source") from error
            texts = domains.setdefault(source, [])
            if max_bytes:
                text = text[: left.setdefault(source, max_bytes)]
                left[source] -= len(text)
            if text:
                texts.append(text.decode(errors="ignore"))
    if not any(domains.values()):
        raise UserError(f"{path} holds no text")
    return {source: texts for source, texts in sorted(domains.items()) if texts}

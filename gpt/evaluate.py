"""Evaluate a GPT: python -m gpt.evaluate --checkpoint RUN --data DIR [--split val] [--json FILE]

Per domain (the source of the documents) and in total: loss, perplexity and bits per byte, beside the bits per
byte of a unigram model of the tokens and of bz2 and xz on the same bytes. On a tape of numbers: next-bin
loss, CRPS and coverage beside five baselines, see gpt.forecast.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import bz2
import dataclasses
import json
import lzma
import math
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

import tapelm
from data.numbers import TAPE, Tape
from gpt.checkpoint import load_model, sha256_of
from gpt.cli import UserError, parse_options, prepare_output, print_titled, run_program, write_atomically
from gpt.corpus import (
    END_OF_TEXT,
    not_out_of_sample,
    open_tokenizer,
    read_domains,
    text_sha256,
    training_counts,
)
from gpt.forecast import print_tape_table, score_tape
from gpt.hardware import fingerprint, pick_device, set_threads
from gpt.model import GPT


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Scores a GPT on held-out data: bits per byte of text beside compressors, forecasts of a tape of numbers
    beside baselines."""

    checkpoint: Path
    """A run directory or one of its checkpoints."""
    data: Path
    """Data directory written by `python -m data.prepare`."""
    json: Path | None = None
    """Also write the result here; RUN/evaluation.json is where benchmarks models looks for it."""
    split: Literal["train", "val", "test"] = "val"
    """Which part of the data."""
    max_bytes: int = 0
    """Evaluate at most this many bytes of text in each domain, from its start; 0 takes everything."""
    batch_size: int = 16
    """Windows in one forward pass."""
    kernels: Literal["auto", "plain", "optimized"] = "auto"
    """auto takes the table of ops the model was trained with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.max_bytes < 0:
            raise UserError(f"--max-bytes must not be negative, got {self.max_bytes}")


def token_stream(tokenizer: tapelm.Tokenizer, texts: list[str]) -> np.ndarray:
    """Ids of all texts, each followed by <|endoftext|>, as int64 (tokens,)."""
    end = np.array([tokenizer.special_tokens[END_OF_TEXT]], dtype=np.int64)
    pieces = [piece for ids in tokenizer.encode_batch(texts) for piece in (ids.astype(np.int64), end)]
    return np.concatenate(pieces)


@torch.no_grad()
def stream_nats(model: GPT, stream: np.ndarray, *, end_of_text: int, batch_size: int = 16) -> float:
    """Total negative log-likelihood of `stream` (tokens,), every token scored once.

    The stream is cut into blocks; inputs are the stream shifted by one, behind an <|endoftext|>.
    """
    device, block = model.head.weight.device, model.config.block_size
    inputs = np.concatenate((np.array([end_of_text], dtype=np.int64), stream[:-1]))
    whole = len(stream) // block * block
    batches = [  # pairs of (B, T); the tail shorter than a block is a batch of its own
        (inputs[:whole].reshape(-1, block), stream[:whole].reshape(-1, block)),
        (inputs[None, whole:], stream[None, whole:]),
    ]
    nats = 0.0
    for all_inputs, all_targets in batches:
        if all_targets.size == 0:
            continue
        for start in range(0, len(all_inputs), batch_size):
            ids = torch.from_numpy(all_inputs[start : start + batch_size]).to(device)
            targets = torch.from_numpy(all_targets[start : start + batch_size]).to(device)
            losses = F.cross_entropy(
                model.logits(ids).float().flatten(0, 1), targets.flatten(), reduction="none"
            )
            nats += float(losses.double().sum())
    return nats


def unigram_bits(counts: np.ndarray, stream: np.ndarray) -> float:
    """Bits of `stream` under an add-one unigram model with training counts (vocabulary,)."""
    bits = np.log2(counts.sum() + counts.size) - np.log2(counts + 1.0)
    return float(bits[stream].sum())


def score(nats: float, unigram: float, data: bytes, *, tokens: int, documents: int) -> dict[str, float | int]:
    """One row of the result from the totals of a domain; bits per byte count the bytes of the text only."""
    return {
        "documents": documents,
        "bytes": len(data),
        "tokens": tokens,
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / len(data),
        "unigram_bits_per_byte": unigram / len(data),
        "bz2_bits_per_byte": 8 * len(bz2.compress(data, 9)) / len(data),
        "xz_bits_per_byte": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The result that main() writes: {"split", "checkpoint", ..., "domains": {name: row}, "total": row}.

    On a tape of numbers the rows are those of gpt.forecast.
    """
    device = pick_device(config.device)
    model, checkpoint, state = load_model(config.checkpoint, kernels=config.kernels, device=str(device))
    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    check_same_tokenizer(checkpoint / "tokenizer.json", config.data / "tokenizer.json")
    of_run = {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "block_size": model.config.block_size,
        "trained": {key: state[key] for key in ("tokens", "seconds")},
        "machine": fingerprint(device),
        "text_sha256": text_sha256(config.data, config.split),
    }
    if warning := not_out_of_sample(config.data, config.split, state.get("trained_until")):
        print(warning, file=sys.stderr)
    if (config.data / TAPE).is_file():
        tape = Tape.load(config.data)
        check_same_tape(checkpoint, state, config.data)
        return of_run | score_tape(model, tokenizer, tape, config.split, config.batch_size)
    end_of_text = tokenizer.special_tokens[END_OF_TEXT]
    domains = read_domains(config.data / "documents" / f"{config.split}.jsonl", config.max_bytes)
    counts = training_counts(config.data / "train", tokenizer.vocab_size)

    rows: dict[str, dict[str, float | int]] = {}
    total_nats, total_unigram, total_tokens, total_documents, everything = 0.0, 0.0, 0, 0, bytearray()
    for source, texts in domains.items():
        data = "".join(texts).encode()
        stream = token_stream(tokenizer, texts)
        nats = stream_nats(model, stream, end_of_text=end_of_text, batch_size=config.batch_size)
        unigram = unigram_bits(counts, stream)
        rows[source] = score(nats, unigram, data, tokens=len(stream), documents=len(texts))
        total_nats, total_unigram = total_nats + nats, total_unigram + unigram
        total_tokens, total_documents = total_tokens + len(stream), total_documents + len(texts)
        everything += data
    return {
        "split": config.split,
        "max_bytes": config.max_bytes,
        **of_run,
        "domains": rows,
        "total": score(
            total_nats, total_unigram, bytes(everything), tokens=total_tokens, documents=total_documents
        ),
    }


def check_same_tokenizer(of_model: Path, of_data: Path) -> None:
    """Raise UserError unless both files have the same SHA-256: the unigram model counts ids of the shards."""
    open_tokenizer(of_data)
    if sha256_of(of_model) != sha256_of(of_data):
        raise UserError(
            f"{of_model} and {of_data} are different tokenizers: use the data the model was trained on"
        )


def check_same_tape(checkpoint: Path, state: dict[str, Any], data: Path) -> None:
    """Raise UserError unless the model was trained on this tape; any splits have the same tokenizer."""
    trained_on = state.get("tape_sha256")
    if trained_on is None:
        raise UserError(f"{checkpoint} does not say which tape it was trained on: train again on {data}")
    if trained_on != Tape.sha256(data):
        raise UserError(
            f"{checkpoint} was trained on the tape that {state['config']['data']} held, {data} has other "
            "rows, splits or bins: use that one or train again on this one"
        )


def print_table(result: dict[str, Any]) -> None:
    table = Table()
    columns = ("domain", "bytes", "tokens", "loss", "perplexity", "bits/byte", "unigram", "bz2 -9", "xz -9")
    for column in columns:
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, row in (*result["domains"].items(), ("total", result["total"])):
        numbers = [row[f"{key}bits_per_byte"] for key in ("", "unigram_", "bz2_", "xz_")]
        counts = (f"{row['bytes']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['perplexity']:.2f}")
        table.add_row(name, *counts, *(f"{number:.3f}" for number in numbers))
    print_titled(f"{result['split']} of {result['checkpoint']}", table)


def main(arguments: list[str]) -> int:
    config = parse_options(EvaluateConfig, arguments, prog="python -m gpt.evaluate")
    set_threads(config.threads)
    if config.json is not None:
        prepare_output(config.json)
    result = evaluate(config)
    if config.json is not None:
        write_atomically(config.json, json.dumps(result, indent=1) + "\n")
    (print_tape_table if "direction_note" in result else print_table)(result)
    return 0


if __name__ == "__main__":
    run_program(main)

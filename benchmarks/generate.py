"""Greedy generation with a GPT: what a cache of keys and values, our kernels and bf16 buy; transformers.

All variants have the same weights, rounded to bf16 for those in bf16, and continue the same random prompt by
the programs' own loops. Each is timed in turn for one token, which is reading the prompt, and for all; a
further token takes their difference over the number of further tokens. Before that every variant's tokens are
compared. Reading the prompt is held against the GEMM peak, a further token against reading every weight but
the embeddings once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.ceilings import Ceilings
from benchmarks.harness import Row, Seconds, WrongResult, interleave, make_row
from benchmarks.train import VOCAB_SIZE
from gpt.checkpoint import load_model
from gpt.cli import UserError
from gpt.config import ModelConfig, preset
from gpt.generate import Sampling, generate
from gpt.gpt2 import as_gpt2
from gpt.hardware import native_bf16
from gpt.model import GPT
from gpt.ops import load_ops

BASELINE = "plain fp32, no cache"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SLACK = {torch.float32: 1e-4, torch.bfloat16: 0.03}
"""By how much of the largest logit a chosen one may be below it."""


@dataclass(frozen=True)
class Variant:
    """`run(n)` gives n tokens after the prompt."""

    name: str
    dtype: torch.dtype
    run: Callable[[int], list[int]]


def measure(
    checkpoint: Path | None, name: str, prompt_tokens: int, new_tokens: int, device: torch.device, rounds: int
) -> tuple[list[Row], list[str]]:
    """Rows of reading a prompt and of a further token; a line with the reason for what cannot run here.

    checkpoint: whose weights to take; without one, random ones in the shape of the preset `name`.

    Raises UserError where the tokens do not fit the block or times are too noisy, WrongResult where a variant
    chooses other tokens than it should.
    """
    weights = weights_of(checkpoint, name).to(device)
    shape = weights.config
    if prompt_tokens < 1 or new_tokens < 2:
        raise UserError("--prompt-tokens must be at least 1 and --new-tokens at least 2")
    if prompt_tokens + new_tokens > shape.block_size:
        raise UserError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the block of {shape.block_size}: lower "
            "--prompt-tokens or --new-tokens"
        )
    prompt = np.random.default_rng(0).integers(0, shape.vocab_size, prompt_tokens).tolist()
    variants, skipped = build(weights, prompt, device)
    check(weights, variants, prompt, new_tokens)
    ceilings = Ceilings(device, [variant.dtype for variant in variants])
    calls = {
        (variant.name, count): partial(variant.run, count)
        for variant in variants
        for count in (1, new_tokens)
    }
    taken = interleave({f"{count} {key}": call for (key, count), call in calls.items()}, ceilings, rounds)
    prefill = {variant.name: taken[f"1 {variant.name}"] for variant in variants}
    decode = {
        key: [
            (whole - first) / (new_tokens - 1)
            for whole, first in zip(taken[f"{new_tokens} {key}"], seconds, strict=True)
        ]
        for key, seconds in prefill.items()
    }
    if any(second <= 0 for seconds in decode.values() for second in seconds):
        raise UserError(
            "too noisy: all tokens took less time than the first alone; raise --new-tokens, or leave a core "
            "to what else runs (--threads)"
        )
    subject = name if checkpoint is None else checkpoint.resolve().name
    sizes = f"{prompt_tokens} + {new_tokens}"
    rows = rows_of(f"prefill {subject}", sizes, variants, prefill, ceilings, "gemm", weights, prompt_tokens)
    rows += rows_of(f"decode {subject}", sizes, variants, decode, ceilings, "copy", weights, 1)
    return rows, skipped


def weights_of(checkpoint: Path | None, name: str) -> GPT:
    """A plain GPT in float32, for inference."""
    if checkpoint is not None:
        return load_model(checkpoint, kernels="plain")[0].float()
    config = preset(name, data=Path(), out=Path())
    shape = config.model(config.vocab_size or VOCAB_SIZE)
    return GPT(shape, load_ops("plain")).initialize(config.seed).eval()


def build(weights: GPT, prompt: list[int], device: torch.device) -> tuple[list[Variant], list[str]]:
    """All variants that can run here, BASELINE first; a line for each other one."""
    variants = [ours(weights, prompt, torch.float32, "plain", cache=False, name=BASELINE)]
    variants.append(ours(weights, prompt, torch.float32, "plain"))
    skipped, dtypes = [], [torch.float32]
    if native_bf16(device):
        dtypes.append(torch.bfloat16)
    else:
        skipped.append("bf16: this machine does not multiply bfloat16")
    for dtype in dtypes:
        variants.append(ours(weights, prompt, dtype, "optimized"))
        try:
            variants.append(transformers(weights, prompt, dtype))
        except UserError as error:  # it is not installed
            skipped.append(f"transformers {NAMES[dtype]}: {error}")
    return variants, skipped


def ours(
    weights: GPT, prompt: list[int], dtype: torch.dtype, kernels: Literal["plain", "optimized"],
    *, cache: bool = True, name: str = "",
) -> Variant:  # fmt: skip
    model = GPT(weights.config, load_ops(kernels)).to(device=weights.head.weight.device, dtype=dtype).eval()
    model.load_state_dict(weights.state_dict())

    def run(count: int) -> list[int]:
        greedy, vocab_size = Sampling(temperature=0), weights.config.vocab_size
        return list(
            generate(
                model, prompt, greedy, max_new_tokens=count, vocab_size=vocab_size, use_cache=cache
            )
        )  # fmt: skip

    return Variant(name or f"{kernels} {NAMES[dtype]}", dtype, run)


def transformers(weights: GPT, prompt: list[int], dtype: torch.dtype) -> Variant:
    """GPT2LMHeadModel with its own cache. Raises UserError where transformers is not installed."""
    model = as_gpt2(weights).to(dtype)
    ids = torch.tensor([prompt], device=model.device)

    def run(count: int) -> list[int]:
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
            )
        return made[0, len(prompt) :].tolist()

    return Variant(f"transformers {NAMES[dtype]}", dtype, run)


@torch.no_grad()
def check(weights: GPT, variants: list[Variant], prompt: list[int], new_tokens: int) -> None:
    """Raise WrongResult unless every variant chooses the tokens that plain float32 does with its weights.

    Logits that are nearly the same may be taken for one another; behind such a tie texts differ, so that each
    token is held against the logits that follow the variant's own ones.
    """
    for dtype in dict.fromkeys(variant.dtype for variant in variants):
        exact = GPT(weights.config, load_ops("plain")).to(weights.head.weight.device).eval()
        exact.load_state_dict({name: each.to(dtype).float() for name, each in weights.state_dict().items()})
        for variant in variants:
            if variant.dtype is not dtype:
                continue
            found = variant.run(new_tokens)
            if len(found) != new_tokens:
                raise WrongResult(
                    f"{variant.name} made {len(found)} of {new_tokens} tokens: nothing was timed"
                )
            ids = torch.tensor([[*prompt, *found[:-1]]], device=exact.head.weight.device)
            logits = exact.logits(ids)[0, len(prompt) - 1 :]  # (new_tokens, V)
            chosen = logits[torch.arange(new_tokens), torch.tensor(found)]
            below = float((logits.amax(-1) - chosen).max() / logits.abs().max())
            if not below <= SLACK[dtype]:
                raise WrongResult(
                    f"{variant.name} chose a token whose logit is {below:.2g} of the largest one below the "
                    "best: nothing was timed"
                )


def rows_of(
    subject: str, sizes: str, variants: list[Variant], seconds: Seconds, ceilings: Ceilings, bound: str,
    weights: GPT, tokens: int,
) -> list[Row]:  # fmt: skip
    """Rows of `tokens` read at once, against the baseline and, in the same precision, transformers."""
    rows = []
    for variant in variants:
        work = (
            prompt_flops(weights.config, tokens) if bound == "gemm" else decode_bytes(weights, variant.dtype)
        )
        peer = f"transformers {NAMES[variant.dtype]}"
        against = {key: seconds[key] for key in (BASELINE, peer) if key in seconds}
        row = make_row(
            subject, variant.name, sizes, variant.dtype, ceilings.device, seconds[variant.name],
            ceilings.limit(bound, variant.dtype), work, against=against,
        )  # fmt: skip
        row.extra["tokens_per_second"] = 1e3 * tokens / row.median_ms
        rows.append(row)
    return rows


def prompt_flops(shape: ModelConfig, tokens: int) -> float:
    """Of reading `tokens` at once: matrix products, the causal half of attention, the head of the last."""
    matrices = 2 * 12 * shape.n_layer * shape.n_embd**2 * tokens
    attention = 2 * shape.n_layer * shape.n_embd * tokens * (tokens + 1)
    return float(matrices + attention + 2 * shape.vocab_size * shape.n_embd)


def decode_bytes(weights: GPT, dtype: torch.dtype) -> float:
    """Of all weights in `dtype` but the embeddings, of which a token needs one row each."""
    tables = weights.tokens.weight.numel() + weights.positions.weight.numel()
    return float(dtype.itemsize * (sum(each.numel() for each in weights.parameters()) - tables))

"""Generate text: python -m gpt.generate --checkpoint RUN --prompt "The economy" [--temperature 0]

Text streams to standard output as it is sampled; the timing line goes to standard error.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import codecs
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.numbers import is_of_numbers
from gpt.checkpoint import load_model
from gpt.cli import UserError, parse_options, prepare_output, run_program, write_atomically
from gpt.corpus import END_OF_TEXT, open_tokenizer
from gpt.hardware import pick_device, set_threads, synchronize
from gpt.model import GPT, KVCache


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy and ignores the rest."""

    temperature: float = 0.8
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probabilities reach p."""
    seed: int = 0
    """Of the choice among tokens."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:  # NaN fails it as well
            raise UserError(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must fit 64 bits with a sign, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(Sampling):
    """Continues a prompt with a trained GPT; the text streams to standard output."""

    checkpoint: Path = dataclasses.field(kw_only=True)
    """A run directory or one of its checkpoints."""
    prompt: str = ""
    """The text to continue."""
    max_new_tokens: int = 200
    """The text ends after so many tokens, or where the model ends its document."""
    cache: bool = True
    """Keep keys and values of earlier tokens instead of computing them again; the text is the same."""
    kernels: Literal["auto", "plain", "optimized"] = "auto"
    """auto takes the table of ops the model was trained with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    json: Path | None = None
    """Also write prompt, text and timings to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens must not be negative, got {self.max_new_tokens}")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits (V,)."""
    logits = logits.float()
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.cpu()
    if 0 < sampling.top_k < logits.numel():
        kept = logits.topk(sampling.top_k)  # no more where several are equal
        logits = torch.full_like(logits, float("-inf")).scatter(0, kept.indices, kept.values)
    # Neither infinite nor 0 / 0 at a temperature of almost 0.
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-30)
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        # A token stays when the ones before it have not reached p yet, so the most likely one always stays.
        dropped = ids[ordered.cumsum(0) - ordered >= sampling.top_p]
        probabilities[dropped] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    vocab_size: int,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt` (at least one id), all below `vocab_size`.

    The context is the last tokens that fit the block. When it is full, its older half is dropped: positions
    are learned, so the cache has to be rebuilt then, and this happens once in block_size / 2 tokens.
    """
    block_size, device = model.config.block_size, model.head.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    context = prompt[-block_size:]
    cache = KVCache(model.config.n_layer, block_size) if use_cache else None
    for _ in range(max_new_tokens):
        pending = context if cache is None else context[len(cache) :]
        last = model.hidden(torch.tensor([pending], device=device), cache)[0, -1:]
        logits = model.ops.linear(last, model.head.weight, None)[0, :vocab_size]
        token = choose(logits, sampling, generator)
        yield token
        context.append(token)
        if len(context) > block_size:
            context = context[-max(1, block_size // 2) :]
            cache = KVCache(model.config.n_layer, block_size) if use_cache else None


def main(arguments: list[str]) -> int:
    config = parse_options(GenerateConfig, arguments, prog="python -m gpt.generate")
    set_threads(config.threads)
    if config.json is not None:
        prepare_output(config.json)
    device = pick_device(config.device)
    model, checkpoint, state = load_model(config.checkpoint, kernels=config.kernels, device=str(device))
    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    if is_of_numbers(tokenizer):
        raise UserError(
            f"{checkpoint} is a model of a tape of numbers and writes no text: its forecasts come from "
            f"python -m gpt.predict --checkpoint {config.checkpoint} --data {state['config']['data']}"
        )
    end_of_text = tokenizer.special_tokens[END_OF_TEXT]
    try:
        # Every training document follows an end of text, so a prompt starts after one as well.
        prompt = [end_of_text, *tokenizer.encode(config.prompt).tolist()]
    except ValueError as error:
        raise UserError(f"prompt: {error}") from error

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(config.prompt, end="", flush=True)
    pieces, count, first_ms = [config.prompt], 0, 0.0
    started = time.perf_counter()
    tokens = generate(
        model,
        prompt,
        config,
        max_new_tokens=config.max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        use_cache=config.cache,
    )
    for token in tokens:
        count += 1
        first_ms = first_ms or 1000 * (time.perf_counter() - started)
        if token == end_of_text:
            break
        pieces.append(decoder.decode(tokenizer.decode_bytes([token])))
        print(pieces[-1], end="", flush=True)
    synchronize(device)
    latency_ms = 1000 * (time.perf_counter() - started)
    pieces.append(decoder.decode(b"", final=True))
    print(pieces[-1])
    speed = 1000 * count / latency_ms if count else 0.0
    print(f"{count} tokens in {latency_ms:.0f} ms, {speed:.1f} tokens/s", file=sys.stderr)
    if config.json is not None:
        result = {
            "prompt": config.prompt,
            "text": "".join(pieces),
            "new_tokens": count,
            "latency_ms": latency_ms,
            "ms_per_token": latency_ms / count if count else 0.0,
            "first_token_ms": first_ms,
            "tokens_per_second": speed,
            "checkpoint": str(checkpoint),
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()},
        }
        write_atomically(config.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)

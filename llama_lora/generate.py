"""Text from a base model or an adapter: python -m llama_lora.generate --adapter RUN/adapter --prompt "..."

Several prompts are answered as one batch. The text of a single one streams to standard output; timings, with
prefill and decode apart, go to standard error.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gpt.cli import UserError, parse_options, prepare_output, run_program, write_atomically
from gpt.generate import Sampling, choose
from gpt.hardware import pick_device, set_threads, synchronize
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend, open_tokenizer
from llama_lora.dataset import end_of_text
from llama_lora.decoder import Decoder
from llama_lora.results import pick_dtype


@dataclasses.dataclass(frozen=True)
class Choice(Sampling):
    """How the next token is chosen; the two penalties hold at temperature 0 as well."""

    repetition_penalty: float = 1.0
    """Logits of tokens that occurred, prompt included, are divided by it, negative ones multiplied."""
    no_repeat_ngram: int = 0
    """No sequence of so many tokens occurs twice; 0 allows all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be a positive number, got {self.repetition_penalty}")
        if self.no_repeat_ngram < 0:
            raise UserError(f"no_repeat_ngram must not be negative, got {self.no_repeat_ngram}")


GREEDY = Choice(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class GenerateConfig(Choice):
    """Answers prompts with a base model or an adapter; a single answer streams to standard output."""

    prompt: tuple[str, ...] = dataclasses.field(kw_only=True)
    adapter: Path | None = None
    """A PEFT directory; without one the base model answers."""
    model: Path | None = None
    """The base model; the one that the adapter names if not given."""
    method: Literal["auto", "qlora", "lora"] = "auto"
    """qlora: the base in NF4; lora: as it is; auto: as the adapter was trained, without one lora."""
    chat: bool = False
    """Put each prompt into the chat template as the user's message."""
    max_new_tokens: int = 128
    """An answer ends after so many tokens, or where the model ends it."""
    cache: bool = True
    """Keep keys and values of earlier tokens instead of computing them again."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    json: Path | None = None
    """Also write prompts, texts and timings to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.adapter is None and self.model is None:
            raise UserError("pass --adapter, --model or both")


@dataclasses.dataclass(frozen=True)
class Generated:
    """The new tokens of each prompt, without the token that ended it, and what they took."""

    ids: list[list[int]]
    prefill_ms: float
    decode_ms: float
    """All tokens but the first of each prompt."""
    steps: int
    """Passes of the decode."""

    @property
    def ms_per_token(self) -> float:
        return self.decode_ms / self.steps if self.steps else 0.0


def load(
    adapter: Path | None, model: Path | None, method: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """(model of the tapelm backend, tokenizer). Raises UserError for directories that do not fit."""
    recipe, base = Recipe(), model
    if adapter is not None:
        recipe, _ = files.read_recipe(adapter)
        base = files.base_of(adapter, model)
    recipe = dataclasses.replace(recipe, method=files.method_of(adapter, method))
    assert base is not None
    backend = TapelmBackend()
    loaded = backend.load(base, recipe, dtype, device)
    if adapter is not None:
        files.load(adapter, backend.adapters(loaded))
    return loaded.eval(), open_tokenizer(adapter or base)


def generate(
    model: Any, prompts: Sequence[Sequence[int]], choice: Choice = GREEDY, *, max_new_tokens: int,
    stop: frozenset[int] = frozenset(), use_cache: bool = True,
    on_token: Callable[[list[int]], None] | None = None,
) -> Generated:  # fmt: skip
    """Continue every prompt (token ids, at least one each) until a `stop` token or max_new_tokens.

    on_token: called after each pass with the new token of every prompt, -1 for those that have ended.
    """
    if not all(prompts):
        raise UserError("a prompt is empty: it needs at least one token")
    limit = model.config.max_position_embeddings
    if max(map(len, prompts)) + max_new_tokens > limit:
        raise UserError(f"prompt and new tokens exceed the model's {limit} positions: ask for fewer")
    generators = [torch.Generator().manual_seed(choice.seed + row) for row in range(len(prompts))]
    decoder = Decoder(model, prompts, max_new_tokens, use_cache=use_cache)
    history, new = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    ended = [False] * len(prompts)
    marks, started = [], time.perf_counter()
    for _ in range(max_new_tokens):
        logits = decoder.logits()
        tokens = []
        for row, generator in enumerate(generators):
            token = -1
            if not ended[row]:
                token = choose(penalized(logits[row], history[row], choice), choice, generator)
                history[row].append(token)
                ended[row] = token in stop
                if not ended[row]:
                    new[row].append(token)
            tokens.append(token)
        synchronize(decoder.device)
        marks.append(time.perf_counter())
        if on_token is not None:
            on_token([-1 if end else token for token, end in zip(tokens, ended, strict=True)])
        if all(ended):
            break
        decoder.append(torch.tensor(tokens, device=decoder.device).clamp(min=0))
    return Generated(new, 1e3 * (marks[0] - started), 1e3 * (marks[-1] - marks[0]), len(marks) - 1)


def penalized(logits: Tensor, history: Sequence[int], choice: Choice) -> Tensor:
    """logits (V,) after the repetition penalty and with tokens that would repeat an n-gram at -inf."""
    if choice.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        values = logits[seen].float()
        scaled = torch.where(
            values > 0, values / choice.repetition_penalty, values * choice.repetition_penalty
        )
        logits = logits.float().index_put((seen,), scaled)
    if banned := repeating(history, choice.no_repeat_ngram):
        logits = logits.index_fill(0, torch.tensor(banned, device=logits.device), -math.inf)
    return logits


def repeating(history: Sequence[int], size: int) -> list[int]:
    """Tokens that would end an n-gram of `size` tokens that is in the history already."""
    if size == 0 or len(history) < size:
        return []
    last = tuple(history[len(history) - size + 1 :])
    places = range(len(history) - size + 1)
    return sorted({history[i + size - 1] for i in places if tuple(history[i : i + size - 1]) == last})


def stop_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset({end_of_text(tokenizer), tokenizer.eos_token_id} - {None})


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Ids of a prompt, in the chat template as a question of the user if `chat`."""
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: leave --chat out")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer(
    question: str, model: Any, tokenizer: Any, choice: Choice = GREEDY, *, max_new_tokens: int = 128
) -> str:
    """The model's answer to a question of the user: the new text only."""
    ids = [encode(tokenizer, question, chat=True)]
    stop = stop_tokens(tokenizer)
    found = generate(model, ids, choice, max_new_tokens=max_new_tokens, stop=stop).ids[0]
    return tokenizer.decode(found, skip_special_tokens=True)


class Stream:
    """Prints the text of one prompt as it grows, in whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, tokens: list[int]) -> None:
        if tokens[0] < 0:
            return
        self.ids.append(tokens[0])
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        """Prints what no later token can complete, and the end of the line."""
        print(self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.shown) :], flush=True)


def main(arguments: list[str]) -> int:
    config = parse_options(GenerateConfig, arguments, prog="python -m llama_lora.generate")
    set_threads(config.threads)
    if config.json is not None:
        prepare_output(config.json)
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    model, tokenizer = load(config.adapter, config.model, config.method, dtype, device)
    prompts = [encode(tokenizer, prompt, chat=config.chat) for prompt in config.prompt]
    stream = Stream(tokenizer) if len(prompts) == 1 else None
    found = generate(
        model, prompts, config, max_new_tokens=config.max_new_tokens, stop=stop_tokens(tokenizer),
        use_cache=config.cache, on_token=stream,
    )  # fmt: skip
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.ids]
    if stream is not None:
        stream.end()
    else:
        for prompt, text in zip(config.prompt, texts, strict=True):
            print(f"{prompt}\n  {text}\n")
    print(
        f"prefill {found.prefill_ms:.0f} ms, decode {found.ms_per_token:.1f} ms a token ({found.steps})",
        file=sys.stderr,
    )
    if config.json is not None:
        result = {
            "prompts": list(config.prompt),
            "texts": texts,
            "new_tokens": [len(ids) for ids in found.ids],
            "prefill_ms": found.prefill_ms,
            "decode_ms": found.decode_ms,
            "ms_per_token": found.ms_per_token,
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()},
        }
        write_atomically(config.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)

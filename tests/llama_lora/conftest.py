"""A Llama with random weights, small enough to train on in a second, and text for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import tapelm

TEXT = "the economy grew by three percent while prices of food and energy fell again in March"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sentences(seed: int, count: int) -> list[str]:
    chosen, words = random.Random(seed), TEXT.split(" ")
    return [" ".join(chosen.choices(words, k=chosen.randint(5, 60))) + "." for _ in range(count)]


@pytest.fixture(autouse=True)
def everything_on_one_thread(one_thread):
    """In every test here."""


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the GEMM ceiling takes longer than the runs of these tests."""
    monkeypatch.setattr("llama_lora.results.gemm_peak_flops", lambda device, precision: 1e11)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: 3 layers, 4 heads over 2 groups, 320 tokens, ChatML-like template."""
    from gpt.extras import transformers

    library, directory = transformers(), tmp_path_factory.mktemp("model")
    tapelm.Tokenizer.train(sentences(0, 200), 300).save(directory / "plain.json")
    tokenizer = library.PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "plain.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = library.LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    library.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path):
    from llama_lora.backends import open_tokenizer

    return open_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for number, (split, count) in enumerate({"train": 60, "val": 12}.items()):
        lines = [json.dumps({"text": text}) for text in sentences(number, count)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory

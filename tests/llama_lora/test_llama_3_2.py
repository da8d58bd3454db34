"""The shapes of Llama-3.2-1B and 3B with random weights: on meta tensors, then a block at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt import extras
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend
from llama_lora.config import FinetuneConfig
from llama_lora.dataset import Example
from llama_lora.modules import LoraLinear
from llama_lora.packing import collate
from llama_lora.results import model_bytes
from llama_lora.verify import verify

CPU = torch.device("cpu")
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
}
ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


def config_of(size: str, **changes: Any) -> Any:
    return extras.transformers().LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5,
        tie_word_embeddings=True, rope_parameters=ROPE, **SHAPES[size] | changes,
    )  # fmt: skip


def on_meta(size: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return extras.transformers().LlamaForCausalLM(config_of(size, **changes)).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("size", "adapters", "megabytes"), [("1B", 11_272_192, 1050), ("3B", 24_313_856, 2290)]
)
def test_shapes_and_sizes_without_memory(size, adapters, megabytes) -> None:
    model: Any = TapelmBackend().equip(on_meta(size).requires_grad_(False), Recipe("qlora"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapters
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    bytes_ = sum(t.numel() * t.element_size() for t in tensors.values())
    assert bytes_ / 1e6 == pytest.approx(megabytes, rel=0.03)
    ids = np.zeros(32, dtype=np.int64)
    batch = collate([[Example(ids, ids)]], 0, 0, torch.device("meta"))
    x = model.model.embed_tokens(batch.ids)
    angles = (x.new_empty(1, 32, model.model.layers[0].self_attn.head_dim),) * 2
    assert model.model.layers[0](x, position_embeddings=angles).shape == x.shape


def random_model(size: str, **changes: Any) -> Any:
    """Quantized block by block: only one dense matrix is held at a time."""
    model: Any = TapelmBackend().equip(on_meta(size, **changes).requires_grad_(False), Recipe("qlora"))
    generator = torch.Generator().manual_seed(0)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                weight = torch.randn(child.shape, generator=generator).mul_(0.02).bfloat16()
                setattr(module, name, LoraLinear(weight, 16, 1.0, quantize=True))
    embedding = torch.randn(128256, model.config.hidden_size, generator=generator).mul_(0.02).bfloat16()
    model.model.embed_tokens.weight = torch.nn.Parameter(embedding, requires_grad=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    for module in model.modules():
        if hasattr(module, "eps"):
            module.weight = torch.nn.Parameter(
                torch.ones(module.weight.shape).bfloat16(), requires_grad=False
            )
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    files.reset(TapelmBackend().adapters(model), 0)
    return model


def verify_and_step(size: str, length: int, **changes: Any) -> None:
    backend, model = TapelmBackend(), random_model(size, **changes)
    assert verify(backend, model, Recipe("qlora"), Path("none"), CPU).cosine >= 0.999
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = backend.optimizer(model, FinetuneConfig(Path(), Path(), Path(), learning_rate=1e-3))
    ids = np.random.default_rng(0).integers(0, 128256, length)
    batch = collate([[Example(ids, np.append(ids[1:], -100))]], 0, 0, CPU)
    losses = []
    for _ in range(3):
        loss = backend.loss(model.train(), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model_bytes(model) < 2.5e9


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1B", "3B"])
def test_two_blocks_are_verified_and_trained(size) -> None:
    verify_and_step(size, 64, num_hidden_layers=2)


@pytest.mark.slow
def test_all_of_1b_is_verified_and_trained() -> None:
    verify_and_step("1B", 128)

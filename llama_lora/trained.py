"""The part of a model that trains: what checkpoints hold of it and what is published at the end."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gpt.cli import replaced_directory
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.config import FinetuneConfig

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


class Trained:
    """The parameters that require a gradient, by name; has what gpt.checkpoint asks of a model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = SimpleNamespace(**{name: getattr(model.config, name) for name in SHAPE})
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.parameters.items()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state_dict[name])

    def publish(self, config: FinetuneConfig, backend: Any, recipe: Recipe, tokenizer: Any) -> None:
        """Write RUN/adapter, or RUN/model when all weights train, with the tokenizer; whole or not at all."""
        adapters = backend.adapters(self.model)
        with replaced_directory(config.out / ("adapter" if adapters else "model")) as staging:
            if adapters:
                files.write(staging, adapters, recipe, config.model)
            else:
                self.model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            for path in staging.iterdir():
                path.chmod(0o644)

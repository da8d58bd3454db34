"""Decoding with a model of the tapelm backend: a cache of keys and values that is written in place.

transformers' own loop spends most of a token of a small model outside of products; this one calls the ops of
a block and nothing else.

Shapes: B rows, T new tokens, S tokens so far, Hkv heads, D head width, V vocabulary. Prompts of a batch end
together: shorter ones have padding before them, which nobody attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tapelm


class Decoder:
    """The logits of the next token, for a batch of prompts and then token by token.

    With `use_cache` False all tokens are computed anew for each, by the same ops: what the cache is compared
    with.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], most_new: int, *, use_cache: bool
    ) -> None:
        self.llama, self.head, self.use_cache = model.model, model.lm_head.weight, use_cache
        self.device = self.head.device
        longest = max(len(prompt) for prompt in prompts)
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)[:, None]
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.zeros(len(prompts), longest + most_new, dtype=torch.int64, device=self.device)
        self.ids[:, :longest] = torch.tensor(rows, device=self.device)
        self.length, self.done = longest, 0
        config = model.config
        places = torch.arange(longest + most_new, device=self.device)
        positions = (places - padding).clamp(min=0)  # (B, S)
        # Padding is a document of its own.
        self.documents = (places >= padding).int() if padding.any() else None
        with torch.no_grad():
            self.cos, self.sin = self.llama.rotary_emb(self.head[:1, None], position_ids=positions)
        width = self.llama.layers[0].self_attn.head_dim
        shape = (len(prompts), config.num_key_value_heads, longest + most_new, width)
        self.keys, self.values = (
            [self.head.new_empty(shape) for _ in self.llama.layers] if use_cache else [] for _ in range(2)
        )

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(B, V) after all tokens so far."""
        start = self.done if self.use_cache else 0
        x = F.embedding(self.ids[:, start : self.length], self.llama.embed_tokens.weight)  # (B, T, C)
        cos, sin = (table[:, start : self.length] for table in (self.cos, self.sin))
        documents = None if self.documents is None else self.documents[:, : self.length]
        for index, block in enumerate(self.llama.layers):
            attention = block.self_attn
            h = block.input_layernorm(x)
            q, k, v = (
                project(h).view(*h.shape[:2], -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = tapelm.rope(q, k, cos, sin)
            if self.use_cache:
                k, v = self._cached(index, k, v)
            y = tapelm.attention(q, k, v, scale=attention.scaling, document_ids=documents)
            x = x + attention.o_proj(y.transpose(1, 2).reshape(*h.shape[:2], -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        self.done = self.length
        return tapelm.linear(self.llama.norm(x[:, -1]), self.head)

    def append(self, tokens: Tensor) -> None:
        """tokens (B,) int64 follow."""
        self.ids[:, self.length] = tokens
        self.length += 1

    def _cached(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, Hkv, T, D) written behind those of the layer so far: all (B, Hkv, S, D)."""
        kept = self.keys[layer], self.values[layer]
        for cache, new in zip(kept, (k, v), strict=True):
            cache[:, :, self.done : self.length] = new
        return kept[0][:, :, : self.length], kept[1][:, :, : self.length]

"""One GPT for both tables of ops: learned positions, pre-norm, tanh-GELU, biases, untied head.

Shapes: B windows, T tokens, C = n_embd, H heads, D = C / H, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt.config import ModelConfig
from gpt.ops import Ops, ParameterGroups


class KVCache:
    """Keys and values of the tokens seen so far, (B, H, S, D) for each layer, S up to `most_tokens`; they are
    written in place, so that gradients cannot flow through it."""

    def __init__(self, n_layer: int, most_tokens: int) -> None:
        self.most_tokens, self.lengths = most_tokens, [0] * n_layer
        self.rooms: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def __len__(self) -> int:
        return self.lengths[0]

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that has seen tokens."""
        room, length = self.rooms[layer], self.lengths[layer]
        assert room is not None
        return room[0][:, :, :length], room[1][:, :, :length]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, D = k.shape
        if self.rooms[layer] is None:
            self.rooms[layer] = (
                k.new_empty(B, H, self.most_tokens, D),
                v.new_empty(B, H, self.most_tokens, D),
            )
        length = self.lengths[layer] + T
        if length > self.most_tokens:
            raise ValueError(f"a cache of {self.most_tokens} tokens has no room for {length}")
        self.lengths[layer] = length
        for kept, new in zip(self.kept(layer), (k, v), strict=True):
            kept[:, :, length - T :] = new
        return self.kept(layer)

    def attend(self, ops: Ops, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q over the tokens so far and those of k and v, which are kept; all (B, H, T, D)."""
        return ops.attention(q, *self.append(layer, k, v), 0.0)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops, self.layer, self.n_head, self.dropout = ops, layer, config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.projection = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.ops.linear(x, self.qkv.weight, self.qkv.bias).view(B, T, 3, self.n_head, C // self.n_head)
        # Unbound here, the gradients are put together again by one copy of whole rows.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # three of (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            attended = self.ops.attention(q, k, v, dropout)
        else:
            attended = cache.attend(self.ops, self.layer, q, k, v)
        merged = attended.transpose(1, 2).reshape(B, T, C)
        return self.ops.linear(merged, self.projection.weight, self.projection.bias)


class Block(nn.Module):
    """attention(norm_1(x)), then mlp(norm_2(x)), each added to the stream x after dropout.

    A branch is added where the stream is normalised next, in one op: the block takes the stream x (B, T, C)
    and the branch (B, T, C) that its predecessor left open, None at the start, and returns both alike.
    """

    def __init__(self, config: ModelConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ops, self.dropout = ops, config.dropout
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config, ops, layer)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.contract = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        ops, dropout = self.ops, self.dropout if self.training else 0.0
        if branch is None:
            normed = ops.layer_norm(x, self.norm_1.weight, self.norm_1.bias, self.norm_1.eps)
        else:
            normed, x = add_norm(ops, self.norm_1, x, branch, dropout)
        normed, x = add_norm(ops, self.norm_2, x, self.attention(normed, cache), dropout)
        expand, contract = self.expand, self.contract
        return x, ops.mlp(normed, expand.weight, expand.bias, contract.weight, contract.bias)


def add_norm(
    ops: Ops, norm: nn.LayerNorm, x: Tensor, branch: Tensor, dropout: float
) -> tuple[Tensor, Tensor]:
    """(norm(r), r) with r = x + dropout(branch), all (B, T, C)."""
    return ops.add_norm(branch, x, norm.weight, norm.bias, norm.eps, dropout)


class GPT(nn.Module):
    """A decoder-only transformer whose arithmetic comes from `ops`.

    forward(ids (B, T), targets (B, T)) is the mean loss; logits(ids) is (B, T, V). T is at most block_size.
    """

    def __init__(self, config: ModelConfig, ops: Ops, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.ops, self.activation_checkpointing = config, ops, activation_checkpointing
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> GPT:
        """Weights from `seed` alone: normal(0.02), residual projections scaled by 1/sqrt(2 n_layer)."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith(("projection.weight", "contract.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02, generator=generator)
        return self

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> final normed states (B, T, C); with a cache, ids continue the tokens it holds."""
        start, T = 0 if cache is None else len(cache), ids.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"ids: {start + T} tokens do not fit the block of {self.config.block_size}")
        dropout = self.config.dropout if self.training else 0.0
        x = self.ops.embedding(ids, self.tokens.weight, self.positions.weight[start:], dropout)
        branch: Tensor | None = None
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch, cache)
        assert branch is not None  # n_layer is at least 1
        return add_norm(self.ops, self.norm, x, branch, dropout)[0]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        return self.ops.cross_entropy(hidden.view(-1, hidden.shape[-1]), self.head.weight, targets.view(-1))

    def logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.ops.linear(self.hidden(ids, cache), self.head.weight, None)

    def parameter_groups(self, weight_decay: float) -> ParameterGroups:
        """Matrices decay; biases and norm weights do not."""
        matrices = [parameter for parameter in self.parameters() if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]

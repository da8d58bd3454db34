"""The modules of a Llama block on tapelm ops; they take the places of those of transformers.

Shapes: B rows, T tokens, C model width, Hq and Hkv heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tapelm


class LoraLinear(nn.Module):
    """Frozen weight (N, K), dense or NF4, with trained lora_a (R, K) and lora_b (N, R)."""

    dense: Tensor
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    map: Tensor

    def __init__(self, weight: Tensor, rank: int, scaling: float, *, quantize: bool) -> None:
        super().__init__()
        n, k = weight.shape
        self.shape, self.scaling, self.quantized = (n, k), scaling, quantize
        if quantize:
            state = tapelm.nf4_quantize(weight)
            self.dtype, self.block_size = state.dtype, state.block_size
            for name in ("packed", "absmax", "nested_absmax", "offset", "map"):
                self.register_buffer(name, getattr(state, name))
        else:
            self.dtype = weight.dtype
            self.register_buffer("dense", weight.detach())
        self.lora_a = nn.Parameter(weight.new_zeros(rank, k))
        self.lora_b = nn.Parameter(weight.new_zeros(n, rank))

    @property
    def weight(self) -> Tensor | tapelm.NF4Weight:
        if not self.quantized:
            return self.dense
        return tapelm.NF4Weight(
            self.packed, self.absmax, self.shape, self.dtype, self.block_size, self.nested_absmax,
            self.offset, self.map,
        )  # fmt: skip

    def dense_weight(self) -> Tensor:
        """The frozen weight (N, K) as it takes part in products."""
        weight = self.weight
        return tapelm.nf4_dequantize(weight) if isinstance(weight, tapelm.NF4Weight) else weight

    def forward(self, x: Tensor) -> Tensor:
        return tapelm.lora_linear(x, self.weight, self.lora_a, self.lora_b, self.scaling)


class Linear(nn.Module):
    """y = x weight^T without adapter; weight (N, K) trains or is frozen, as its parameter says."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return tapelm.linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return tapelm.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj: nn.Module = mlp.gate_proj
        self.up_proj: nn.Module = mlp.up_proj
        self.down_proj: nn.Module = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(tapelm.swiglu(self.gate_proj(x), self.up_proj(x)))


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids (B, T) int32 as a mask (B, 1, 1, T) that transformers hands on to Attention unchanged."""
    return document_ids[:, None, None]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; called as transformers calls its own.

    An int32 attention_mask is a document_mask, for queries that no cached keys precede; any other says which
    keys each query sees.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.q_proj: nn.Module = attention.q_proj
        self.k_proj: nn.Module = attention.k_proj
        self.v_proj: nn.Module = attention.v_proj
        self.o_proj: nn.Module = attention.o_proj

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, past_key_values: Any = None, **unused: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        shape = hidden_states.shape[:-1]
        q, k, v = (
            project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, Hq or Hkv, T, D)
        q, k = tapelm.rope(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        documents = None
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            documents, attention_mask = attention_mask[:, 0, 0], None
            if q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"Attention: a document mask of {q.shape[2]} tokens says nothing of the "
                    f"{k.shape[2] - q.shape[2]} keys before them in the cache; pass use_cache=False."
                )
        if attention_mask is None:
            y = tapelm.attention(q, k, v, scale=self.scaling, document_ids=documents)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, scale=self.scaling, enable_gqa=True
            )
        return self.o_proj(y.transpose(1, 2).reshape(*shape, -1)), None

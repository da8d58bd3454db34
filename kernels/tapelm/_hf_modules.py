"""Attention, masks and modules as models of transformers call them; ``tapelm.hf`` puts them into a model.

Shapes: B rows, T tokens, S keys, C model width, Hq and Hkv heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .bias_gelu import bias_gelu
from .nn import RMSNorm, adopt
from .rope import rope

UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache")  # arguments of attention


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids (B, T) int32 as a mask (B, 1, 1, T) that transformers hands on to attention unchanged."""
    return document_ids[:, None, None]


def is_document_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query (B, Hq, T, D) gives (B, T, Hq, D).

    An int32 attention_mask is a document_mask, for queries that no cached keys precede; any other says which
    keys each query sees, by PyTorch's scaled_dot_product_attention. Without one it is causal, the last query
    sees all keys.

    Raises:
        ValueError: an option that none of our families has, or a document mask with cached keys.
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(f"attention of tapelm has no {name}; use attn_implementation='eager'.")
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError("attention of tapelm is causal in transformers; use attn_implementation='sdpa'.")
    documents = None
    if attention_mask is not None and is_document_mask(attention_mask):
        documents, attention_mask = attention_mask[:, 0, 0], None
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                f"Attention: a document mask of {query.shape[2]} tokens says nothing of the "
                f"{key.shape[2] - query.shape[2]} keys before them in the cache; pass use_cache=False."
            )
    if attention_mask is None:
        y = attention(query, key, value, scale=scaling, dropout_p=dropout, document_ids=documents)
    else:
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    return y.transpose(1, 2), None


def attention_mask(**arguments: Any) -> Tensor | None:
    """The mask of a forward pass as transformers asks for it: None, a document mask, or that of its SDPA.

    Packed documents and rows with padding at their end have document masks; padding is a document, what comes
    out there has no meaning, as with FlashAttention. A graph that torch.compile makes of a padded batch has
    SDPA's, as it must not depend on where the padding is.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    theirs = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    keys, offset = arguments["kv_length"], arguments.get("kv_offset", 0)
    places = arguments.get("cache_position")  # of the queries, where q_length and device have no names
    queries = arguments["q_length"] if places is None else places.shape[0]
    window, padding = arguments.get("local_size"), arguments.get("attention_mask")
    if arguments.get("use_vmap") or queries != keys or offset or (window is not None and keys >= window):
        if queries > 1:  # None would mean that queries are the last of the keys
            arguments["allow_is_causal_skip"] = False
        return theirs(**arguments)
    if padding is not None:
        if torch.compiler.is_compiling():
            return theirs(**arguments)
        ends = padding[:, 0].all() & (padding[:, 1:] <= padding[:, :-1]).all()
        none, at_the_end = torch.stack([padding.all(), ends]).tolist()
        if none:
            return None
        return document_mask(padding[:, :keys].int()) if at_the_end else theirs(**arguments)
    if arguments.get("allow_is_causal_skip", True):
        return None
    # Packed documents: one begins where a token does not see the one before it.
    device = arguments["device"] if places is None else places.device
    batch = torch.arange(arguments["batch_size"], device=device)[:, None]
    token = torch.arange(1, keys, device=device)[None]
    seen = arguments["mask_function"](batch, 0, token, token - 1).expand(len(batch), -1)
    return document_mask(F.pad((~seen).cumsum(-1, dtype=torch.int32), (1, 0)))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; takes the place and the layers of transformers' own.

    Those of queries and keys may be followed by norms of each head, as in Qwen3.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.layer_idx: int = module.layer_idx
        self.head_dim: int = module.head_dim
        self.scaling: float = module.scaling
        self.attention_dropout: float = module.attention_dropout
        self.is_causal = True
        self.q_proj: nn.Module = module.q_proj
        self.k_proj: nn.Module = module.k_proj
        self.v_proj: nn.Module = module.v_proj
        self.o_proj: nn.Module = module.o_proj
        self.q_norm: nn.Module | None = getattr(module, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(module, "k_norm", None)
        adopt(self, module)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, past_key_values: Any = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        shape = hidden_states.shape[:-1]
        q, k, v = (
            project(hidden_states).view(*shape, -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, Hq or Hkv, D)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        cos, sin = (table[0] if table.shape[0] == 1 else table for table in position_embeddings)
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            where = {"cache_position": options.get("cache_position")}  # only versions that pass it read it
            k, v = past_key_values.update(k, v, self.layer_idx, where)
        y, _ = attention_forward(
            self, q, k, v, attention_mask, self.attention_dropout if self.training else 0.0, self.scaling,
            **options,
        )  # fmt: skip
        return self.o_proj(y.reshape(*shape, -1)), None


class GPT2MLP(nn.Module):
    """``c_proj(gelu(c_fc(x)))`` with dropout; takes the place and the layers of transformers' own."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.c_fc: nn.Module = module.c_fc
        self.c_proj: nn.Module = module.c_proj
        self.dropout: nn.Module = module.dropout
        adopt(self, module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if type(self.c_fc).__name__ == "Conv1D":
            h = bias_gelu(hidden_states @ self.c_fc.weight, self.c_fc.bias)  # type: ignore[operator]
        else:  # an adapter around it, which adds the bias
            h = self.c_fc(hidden_states)
            h = bias_gelu(h, h.new_zeros(h.shape[-1]))
        return self.dropout(self.c_proj(h))


def rms_norm_of(module: Any) -> RMSNorm:
    """An RMSNorm with the weight of transformers' own."""
    return adopt(RMSNorm(module.weight.shape, module.variance_epsilon, device="meta"), module)

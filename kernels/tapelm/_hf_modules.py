"""Attention, masks and modules as models of transformers call them; ``tapelm.hf`` puts them into a model.

Shapes: B rows, T tokens, S keys, C model width, Hq and Hkv heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .bias_gelu import bias_gelu
from .nn import RMSNorm, adopt
from .rope import rope

NAME = "tapelm"  # of our attention in transformers
UNSUPPORTED = ("softcap", "position_bias", "s_aux", "cache")  # arguments of attention


def register() -> None:
    """Gives transformers our attention and its masks, as the implementation "tapelm"."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def document_mask(document_ids: Tensor) -> Tensor:
    """document_ids (B, S) int32 as a mask (B, 1, 1, S) that transformers hands on to attention unchanged."""
    return document_ids[:, None, None]


def padding_mask(tokens: Tensor) -> Tensor:
    """tokens (B, S), 0 at padding, as a mask (B, 1, 1, S) int8: for padding itself attention gives zeros."""
    return tokens[:, None, None].to(torch.int8)


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers calls it: query (B, Hq, T, D) gives (B, T, Hq, D).

    Queries are the last T of the S tokens of the keys and see those before them. An attention_mask that is a
    document_mask or a padding_mask hides other documents and padding; any other says which keys each query
    sees, by PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: an option that none of our families has, or a document mask that is not one for each key.
    """
    for name in UNSUPPORTED:
        if options.get(name) is not None:
            raise ValueError(f"attention of tapelm has no {name}; use attn_implementation='eager'.")
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError("attention of tapelm is causal in transformers; use attn_implementation='sdpa'.")
    if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 4:
        raise ValueError(
            f"Attention: the implementation {module.config._attn_implementation!r} has other masks; call "
            f"model.set_attn_implementation({NAME!r})."
        )
    if attention_mask is None:
        y = attention(query, key, value, scale=scaling, dropout_p=dropout)
    elif attention_mask.dtype in (torch.int8, torch.int32) and attention_mask.shape[1:3] == (1, 1):
        documents = attention_mask[:, 0, 0]
        if documents.shape[1] != key.shape[2]:
            raise ValueError(
                f"Attention: a document mask of {documents.shape[1]} tokens says nothing of the "
                f"{key.shape[2] - documents.shape[1]} keys before them in the cache; pass use_cache=False."
            )
        y = attention(query, key, value, scale=scaling, dropout_p=dropout, document_ids=documents.int())
        if attention_mask.dtype == torch.int8:
            y = y * documents[:, None, -query.shape[2] :, None]
    else:
        y = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    return y.transpose(1, 2), None


def attention_mask(**arguments: Any) -> Tensor | None:
    """The mask of a forward pass as transformers asks for it: None, ours, or that of its SDPA.

    Ours are for queries that are the last of the keys' tokens and see all before them but for padding and
    other documents: in training, and in generation from the prompt on. SDPA's are for windows shorter than
    that, for static caches, whose rest is empty, and for padding in a graph that torch.compile makes, as it
    must not depend on where the padding is.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def theirs() -> Tensor:  # always one, as None would mean that queries are the last of the keys
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**arguments | {"allow_is_causal_skip": False})

    keys, offset, window = arguments["kv_length"], arguments.get("kv_offset", 0), arguments.get("local_size")
    padding, causal = arguments.get("attention_mask"), arguments.get("allow_is_causal_skip", True)
    compiling = torch.compiler.is_compiling()
    places = arguments.get("cache_position")  # of the queries, where these have no other names
    if places is None:
        queries, first, device = arguments["q_length"], arguments.get("q_offset", 0), arguments["device"]
    else:
        queries, device = places.shape[0], places.device
        first = 0 if queries == keys else None if compiling else int(places[0])
    if (
        arguments.get("use_vmap")
        or (window is not None and keys > window)
        or first is None
        or isinstance(first, Tensor)  # a static cache's, of which asking the GPU would wait for it
        or first + queries != offset + keys
    ):
        return theirs()
    if padding is not None:
        padding = F.pad(padding, (-offset, offset + keys - padding.shape[1]))  # or cut, as in transformers
        return theirs() if compiling or not causal else mask_of_padding(padding, queries, theirs)
    if causal:
        return None
    if queries != keys:
        return theirs()
    # Packed documents: one begins where a token does not see the one before it.
    batch = torch.arange(arguments["batch_size"], device=device)[:, None]
    token = torch.arange(1, keys, device=device)[None]
    seen = arguments["mask_function"](batch, 0, token, token - 1).expand(len(batch), -1)
    return document_mask(F.pad((~seen).cumsum(-1, dtype=torch.int32), (1, 0)))


def mask_of_padding(padding: Tensor, queries: int, theirs: Callable[[], Tensor]) -> Tensor | None:
    """The mask of the last ``queries`` of S tokens, of which ``padding`` (B, S) is false at padding.

    Padding is a document. What comes out at it has no meaning and is zero where it comes before all text, as
    with SDPA. SDPA's mask is needed for padding behind text from which a token is predicted: before more text
    and, but in training, at the end.
    """
    text = padding.cumsum(-1) > 0  # whether there is any up to here
    behind, first = text & ~padding, padding.shape[1] - queries
    read = (behind[:, first:-1] & padding[:, first + 1 :]).any()
    last = behind[:, -1].any()
    none, before, read, last = torch.stack([padding.all(), ~text[:, first].all(), read, last]).tolist()
    if none:
        return None
    if read or (last and not torch.is_grad_enabled()):
        return theirs()
    return padding_mask(padding) if before and queries > 1 else document_mask(padding.int())


class Module(nn.Module):
    """A module of a model whose attention is ours; one that is unpickled gives it to transformers first."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()
        super().__setstate__(state)


class Attention(Module):
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


class GPT2MLP(Module):
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

"""A Llama model as one GGUF file, as llama.cpp reads it: weights in bf16, norms in float32, the tokenizer.

llama.cpp rotates pairs of neighbouring elements where transformers rotates halves, so that the rows of each
head's query and key projections are put in another order [convert_hf_to_gguf.py of llama.cpp].

Shapes: weights (N, K) as in transformers; the file lists dimensions from the fastest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import gguf_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write `path`, whole or not at all.

    model: a LlamaForCausalLM of transformers; tokenizer: byte-level BPE. Raises UserError for another kind.
    """
    rounded = {
        name: tensor if tensor.dim() == 1 else tensor.to(torch.bfloat16)
        for name, tensor in tensors(model).items()
    }
    describe = partial(_describe, config=model.config)
    gguf_file.write(path, "llama", rounded, tokenizer, model.config.vocab_size, describe)


def tensors(model: Any) -> dict[str, Tensor]:
    """The weights under the names and in the order of rows that llama.cpp expects."""
    llama, config = model.model, model.config
    found = {
        "token_embd.weight": llama.embed_tokens.weight.detach(),
        "output_norm.weight": llama.norm.weight.detach(),
    }
    if not config.tie_word_embeddings:
        found["output.weight"] = model.lm_head.weight.detach()
    factors = rope_factors(llama, config)
    if not torch.equal(factors, torch.ones_like(factors)):
        found["rope_freqs.weight"] = factors
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for index, block in enumerate(llama.layers):
        for ours, theirs in NAMES.items():
            weight = block.get_submodule(ours).weight.detach()
            if ours in heads:
                rows = weight.view(heads[ours], 2, -1, weight.shape[1])
                weight = rows.transpose(1, 2).reshape(weight.shape)
            found[f"blk.{index}.{theirs}.weight"] = weight
    return found


def rope_factors(llama: Any, config: Any) -> Tensor:
    """(D / 2,) by how much each frequency is lower than that of plain rotary positions."""
    width = llama.layers[0].self_attn.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / config.rope_parameters["rope_theta"] ** exponents
    factors = plain / llama.rotary_emb.inv_freq.float().cpu()
    return torch.where((factors - 1.0).abs() < 1e-6, 1.0, factors)


def _describe(writer: Any, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

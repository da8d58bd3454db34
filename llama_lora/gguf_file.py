"""A Llama model as one GGUF file, as llama.cpp reads it: weights in bf16, norms in float32, the tokenizer.

llama.cpp rotates pairs of neighbouring elements where transformers rotates halves, so that the rows of each
head's query and key projections are put in another order [convert_hf_to_gguf.py of llama.cpp].

Shapes: weights (N, K) as in transformers; the file lists dimensions from the fastest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.cli import UserError
from llama_lora import extras

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
    library = extras.gguf()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    writer = library.GGUFWriter(str(temporary), "llama")
    try:
        _describe(writer, model.config, path.stem)
        _add_tokenizer(writer, tokenizer, model.config.vocab_size, library)
        for name, tensor in tensors(model).items():
            if tensor.dim() == 1:
                writer.add_tensor(name, tensor.float().contiguous().numpy())
            else:
                kind = library.GGMLQuantizationType.BF16
                bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name, bits, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def _describe(writer: Any, config: Any, name: str) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
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
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(32)  # mostly bf16


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int, library: Any) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE":
        raise UserError(f"GGUF export needs a byte-level BPE tokenizer, not {described['model']['type']}")
    added = {entry["id"]: entry for entry in described["added_tokens"]}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = library.TokenType
    tokens, types = [], []
    for i in range(vocab_size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(kinds.UNUSED)
        elif i in added:
            types.append(kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_of(described["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def splitting_of(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before merging. Raises UserError for one not known here."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in json.dumps(parts[0]["pattern"]).replace(
        "\\\\", "\\"
    ):
        return "llama-bpe"
    raise UserError(f"GGUF export does not know this way of splitting text: {', '.join(kinds)}")

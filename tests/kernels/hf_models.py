"""Small models of every family of transformers that tapelm.hf knows, with random weights."""

import torch
from torch import nn

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "llama": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", SIZES | {"sliding_window": None}),
    "mistral with a window": ("Mistral", SIZES | {"sliding_window": 8}),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 32}),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
            "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, **NO_DROPOUT,
        },
    ),
}  # fmt: skip


def make(family: str, **changes: object) -> nn.Module:
    """As transformers makes it, float32, in training mode, with norms and biases that are not 1 or 0."""
    import transformers

    name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(options | changes))
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + head)._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.train()

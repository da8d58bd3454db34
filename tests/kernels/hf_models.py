"""Small models of every family of transformers that tapelm.hf knows, with random weights, and batches."""

import copy

import torch
from torch import nn

import tapelm

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
# Where a layer takes long and a second one says nothing more: in the compiler and the interpreter.
ONE_LAYER = {family: {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1} for family in FAMILIES}

T = 21
PLACES = torch.arange(T)[None]
BATCHES = {
    "full": {},
    "padded right": {"attention_mask": (torch.tensor([[T], [15], [3]]) > PLACES).long()},
    "padded left": {"attention_mask": (torch.tensor([[0], [5], [18]]) <= PLACES).long()},
    "padded at both ends": {
        "attention_mask": ((PLACES >= 3) & (torch.tensor([[T], [15], [9]]) > PLACES)).long()
    },
    "hole": {"attention_mask": ((PLACES != 5) | torch.tensor([[False], [True], [False]])).long()},
    "packed": {"position_ids": torch.cat([torch.arange(8), torch.arange(13)])[None].expand(3, -1)},
}


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


def pair(family, dtype=torch.float32, **changes):
    """transformers' model and the same with our modules."""
    stock = make(family, **changes).to(dtype)
    return stock, tapelm.hf.optimize(copy.deepcopy(stock))


def batch(kind):
    """Ids, labels and the rest; labels are ignored at padding."""
    given = BATCHES[kind]
    ids = torch.randint(1, 97, (3, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 4] = -100
    if "attention_mask" in given:
        labels[given["attention_mask"] == 0] = -100
    return ids, labels, given

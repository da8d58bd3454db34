"""Our GPT as the GPT2LMHeadModel of transformers: the same arithmetic, other names, matrices transposed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gpt import extras
from gpt.model import GPT, Attention, Block


def as_gpt2(model: GPT, *, end_of_text: int | None = None) -> Any:
    """A GPT2LMHeadModel with copies of the weights, in their dtype, on their device, in the mode of `model`.

    end_of_text: the id that stands before and behind a text, if there is one. Raises UserError without
    transformers.
    """
    library, shape, head = extras.transformers(), model.config, model.head.weight
    config = library.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd,
        n_layer=shape.n_layer, n_head=shape.n_head, activation_function="gelu_new",
        layer_norm_epsilon=model.norm.eps, tie_word_embeddings=False,
        resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
        bos_token_id=end_of_text, eos_token_id=end_of_text,
    )  # fmt: skip
    theirs = library.GPT2LMHeadModel(config).to(device=head.device, dtype=head.dtype)
    theirs.load_state_dict(gpt2_weights(model), strict=True)
    return theirs.train(model.training)


def gpt2_weights(model: GPT) -> dict[str, Tensor]:
    """Copies of the weights under the names of GPT2LMHeadModel, whose blocks have matrices (in, out)."""
    state: dict[str, Tensor] = {
        "transformer.wte.weight": model.tokens.weight,
        "transformer.wpe.weight": model.positions.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "transformer.ln_f.bias": model.norm.bias,
        "lm_head.weight": model.head.weight,
    }
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block) and isinstance(block.attention, Attention)
        for name, module in (
            ("ln_1", block.norm_1), ("attn.c_attn", block.attention.qkv), ("ln_2", block.norm_2),
            ("attn.c_proj", block.attention.projection), ("mlp.c_fc", block.expand),
            ("mlp.c_proj", block.contract),
        ):  # fmt: skip
            weight = module.weight.t() if isinstance(module, nn.Linear) else module.weight
            state[f"transformer.h.{number}.{name}.weight"] = weight
            state[f"transformer.h.{number}.{name}.bias"] = module.bias
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}

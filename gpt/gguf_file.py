"""A model as one GGUF file, as llama.cpp reads it; how a GPT of ours is told in one.

Shapes: weights (N, K) as in nn.Linear; the file lists dimensions from the fastest.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt import extras
from gpt.cli import UserError
from gpt.model import GPT, Attention, Block

ALL_FLOAT32, MOSTLY_BF16 = 0, 32  # general.file_type


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    vocab_size: int,
    describe: Callable[[Any], None],
) -> None:
    """Write `path`, whole or not at all.

    tensors: by llama.cpp's names; matrices in bf16 stay so, all else is written in float32. tokenizer: of
    transformers, byte-level BPE; `describe` adds what the architecture needs to a gguf.GGUFWriter. Raises
    UserError for a tokenizer of another kind or without merges, OSError when the disk is full.
    """
    library = extras.gguf()
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    writer = library.GGUFWriter(str(temporary), architecture)
    try:
        kept = {
            name for name, tensor in tensors.items() if tensor.dim() > 1 and tensor.dtype == torch.bfloat16
        }
        writer.add_name(path.stem)
        describe(writer)
        writer.add_vocab_size(vocab_size)
        writer.add_file_type(MOSTLY_BF16 if kept else ALL_FLOAT32)
        _add_tokenizer(writer, tokenizer, vocab_size, library)
        for name, tensor in tensors.items():
            if name in kept:
                bits = tensor.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(name, bits, raw_dtype=library.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, path)
    except OSError as error:  # NumPy's says neither what is wrong nor where
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def write_gpt(model: GPT, tokenizer: Any, path: Path) -> None:
    """`write` of a GPT, llama.cpp's architecture gpt2; positions in float32, as its converter has them."""
    shape = model.config

    def describe(writer: Any) -> None:
        writer.add_context_length(shape.block_size)
        writer.add_embedding_length(shape.n_embd)
        writer.add_block_count(shape.n_layer)
        writer.add_feed_forward_length(4 * shape.n_embd)
        writer.add_head_count(shape.n_head)
        writer.add_layer_norm_eps(model.norm.eps)

    write(path, "gpt2", gpt_tensors(model), tokenizer, shape.vocab_size, describe)


def gpt_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights of a GPT under llama.cpp's names."""
    found = {
        "token_embd.weight": model.tokens.weight,
        "position_embd.weight": model.positions.weight.float(),
        "output_norm.weight": model.norm.weight,
        "output_norm.bias": model.norm.bias,
        "output.weight": model.head.weight,
    }
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block) and isinstance(block.attention, Attention)
        modules: dict[str, nn.Linear | nn.LayerNorm] = {
            "attn_norm": block.norm_1, "attn_qkv": block.attention.qkv,
            "attn_output": block.attention.projection, "ffn_norm": block.norm_2, "ffn_up": block.expand,
            "ffn_down": block.contract,
        }  # fmt: skip
        for name, module in modules.items():
            found[f"blk.{number}.{name}.weight"] = module.weight
            found[f"blk.{number}.{name}.bias"] = module.bias
    return {name: tensor.detach() for name, tensor in found.items()}


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
    if not merges:
        raise UserError("llama.cpp reads no tokenizer without merges, as that of numbers is: no GGUF export")
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

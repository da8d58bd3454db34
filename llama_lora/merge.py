"""Merge an adapter into the bf16 base: python -m llama_lora.merge --adapter RUN/adapter --out DIR

Writes a Hugging Face directory of safetensors. With --data it reports the perplexity of the validation split
under the base with its adapter, as trained, and under the merged model: an adapter that was trained over NF4
weights meets the unquantized ones in the merge, and sums are rounded to bf16 once more.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from gpt.cli import (
    UserError,
    parse_options,
    prepare_output,
    replaced_directory,
    run_program,
    write_atomically,
)
from gpt.hardware import pick_device, set_threads
from llama_lora import adapters as files
from llama_lora import gguf_file
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend, open_base, open_tokenizer
from llama_lora.dataset import end_of_text, find_split, read_examples
from llama_lora.packing import Rows
from llama_lora.results import pick_dtype
from llama_lora.session import evaluate_rows


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Sums an adapter into its base: a bf16 model that needs no adapter, and if asked for a GGUF file."""

    adapter: Path
    """A PEFT directory."""
    out: Path
    """Directory to write; it may not exist."""
    model: Path | None = None
    """The base model; the one that the adapter names if not given."""
    method: Literal["auto", "qlora", "lora"] = "auto"
    """What the adapter was trained over: with --data, its perplexity is taken there; ours say it."""
    data: Path | None = None
    """Report the perplexity drift on the validation split of this directory."""
    block_size: int = 512
    """Tokens in a row of the validation."""
    rows: int = 64
    """Rows of the validation split to evaluate; 0 takes all."""
    gguf: Path | None = None
    """Also write the merged model as this GGUF file, bf16, for llama.cpp."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    json: Path | None = None
    """Also write the perplexities to this file."""


@torch.no_grad()
def merged_model(base: Path, adapter: Path) -> Any:
    """The base in bf16 with W + scaling * B A in each adapted layer, summed in float32 and rounded once."""
    recipe, _ = files.read_recipe(adapter)
    model = TapelmBackend().equip(open_base(base, torch.bfloat16), dataclasses.replace(recipe, method="lora"))
    adapters = TapelmBackend().adapters(model)
    files.load(adapter, adapters)
    matrices = files.named_tensors(adapters)
    plain = open_base(base, torch.bfloat16)
    for name in adapters:
        a, b = (matrices[f"{files.PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        weight = plain.get_submodule(name).weight
        weight.copy_(weight.float() + recipe.scaling * b @ a)
    return plain


def merge(base: Path, adapter: Path, out: Path) -> Any:
    """Write `out`, whole or not at all; the merged transformers model is returned."""
    if out.exists():
        raise UserError(f"{out} exists: name another --out")
    plain, tokenizer = merged_model(base, adapter), open_tokenizer(adapter)
    with replaced_directory(out) as staging:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors leaves 0600
    return plain


def drift(config: MergeConfig, base: Path, plain: Any) -> dict[str, float]:
    """Perplexities of the base, of the base with the adapter and of the merged model on the same rows."""
    assert config.data is not None
    device = pick_device(config.device)
    dtype, backend = pick_dtype("auto", device), TapelmBackend()
    recipe, _ = files.read_recipe(config.adapter)
    tokenizer = open_tokenizer(config.adapter)
    examples = read_examples(find_split(config.data, "val"), tokenizer)
    rows = Rows(examples, config.block_size, packing=True, pad_id=end_of_text(tokenizer))
    adapted = backend.load(base, dataclasses.replace(recipe, method=config.method), dtype, device)
    found = {}
    for name in ("base", "adapter"):
        if name == "adapter":
            files.load(config.adapter, backend.adapters(adapted))
        found[name] = math.exp(evaluate_rows(backend, adapted, rows, 4, config.rows, device))
    # Without adapters: all layers plain, none of them trained.
    merged = backend.equip(plain, Recipe("full")).to(device=device, dtype=dtype)
    found["merged"] = math.exp(evaluate_rows(backend, merged, rows, 4, config.rows, device))
    found["drift"] = found["merged"] / found["adapter"] - 1.0
    return found


def main(arguments: list[str]) -> int:
    config = parse_options(MergeConfig, arguments, prog="python -m llama_lora.merge")
    set_threads(config.threads)
    for path in (config.json, config.gguf):
        if path is not None:
            prepare_output(path)
    base = files.base_of(config.adapter, config.model)
    if config.data is not None:
        find_split(config.data, "val")  # nothing is written before it is known to be there
        config = dataclasses.replace(config, method=files.method_of(config.adapter, config.method))
    plain = merge(base, config.adapter, config.out)
    print(f"wrote {config.out}", file=sys.stderr)
    if config.gguf is not None:
        gguf_file.write(plain, open_tokenizer(config.adapter), config.gguf)
        print(f"wrote {config.gguf}", file=sys.stderr)
    if config.data is not None:
        found = drift(config, base, plain)
        over = "in NF4, over which the adapter was trained," if config.method == "qlora" else "as it is"
        print(
            f"perplexity: base {over} {found['base']:.3f}, with adapter {found['adapter']:.3f}; merged into "
            f"the dense base {found['merged']:.3f} ({found['drift']:+.2%})"
        )
        if config.json is not None:
            write_atomically(config.json, json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)

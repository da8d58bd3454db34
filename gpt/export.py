"""Export a GPT: python -m gpt.export --checkpoint RUN --format {hf,gguf} --out DIR

hf      model.safetensors, config.json and the tokenizer, a directory that transformers loads as a GPT-2
gguf    model.gguf for llama.cpp, tokenizer included

What was written is read back by transformers before it takes its place: its logits have to be those of our
model, its ids those of our tokenizer. DIR/export.json says what was exported and how far logits were apart.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import contextlib
import dataclasses
import errno
import io
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from gpt import extras, gguf_file
from gpt.checkpoint import load_model, sha256_of
from gpt.cli import (
    UserError,
    parse_options,
    prepare_folder,
    replaced_directory,
    run_program,
    write_atomically,
)
from gpt.corpus import END_OF_TEXT, open_tokenizer
from gpt.gpt2 import as_gpt2
from gpt.hardware import set_threads
from gpt.model import GPT
from tapelm import Tokenizer

RECORD, GGUF = "export.json", "model.gguf"
TOLERANCE = 1e-4  # of the largest logit, or of 1
TOKENS, LONGEST = 512, 1024  # compared: at least so many tokens, in windows of at most so many


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Writes a GPT for transformers or llama.cpp, after reading it back and comparing logits and ids."""

    checkpoint: Path
    """A run directory or one of its checkpoints."""
    format: Literal["hf", "gguf"]
    """hf: a directory for transformers; gguf: model.gguf for llama.cpp."""
    out: Path
    """Directory to write; one that exists is replaced if it is an unchanged export of the same format."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the weights; auto keeps the checkpoint's. In GGUF positions, norms and biases are in float32."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write config.out, whole or not at all; returns what export.json says.

    Raises UserError where there is nothing to export, where config.out may not be replaced, and when what was
    written does not compute what the checkpoint does.
    """
    extras.transformers()
    if config.format == "gguf":
        extras.gguf()
    out = config.out.resolve()
    check_replaceable(out, config.format)
    model, checkpoint, state = load_model(config.checkpoint, kernels="plain")
    if config.dtype != "auto":
        model = model.to(torch.float32 if config.dtype == "fp32" else torch.bfloat16)
    tokenizer = open_tokenizer(checkpoint / "tokenizer.json")
    theirs = hf_tokenizer(checkpoint / "tokenizer.json", model.config.block_size)
    prepare_folder(out)
    with replaced_directory(out) as staging:
        if config.format == "hf":
            write_hf(model, tokenizer, theirs, staging)
        else:
            gguf_file.write_gpt(model, theirs, staging / GGUF)
        dtype = str(model.head.weight.dtype).removeprefix("torch.")
        difference = compare(model.float(), tokenizer, config.format, staging)
        record = {
            "format": config.format,
            "dtype": dtype,
            "checkpoint": str(checkpoint),
            "step": state["step"],
            "largest_logit_difference": difference,
            "sha256": {path.name: sha256_of(path) for path in sorted(staging.iterdir())},
        }
        write_atomically(staging / RECORD, json.dumps(record, indent=1) + "\n")
        for path in staging.iterdir():
            path.chmod(0o644)  # safetensors leaves 0600
    return record


def check_replaceable(out: Path, kind: str) -> None:
    """Raise UserError unless there is nothing at `out`, an empty directory, or such an export, unchanged."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        found, hashes = record["format"], dict(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out} exists and is no earlier export: name another --out") from error
    if found != kind:
        raise UserError(f"{out} is an export in the format {found}: name another --out")
    for path in out.iterdir():
        if path.name != RECORD and (not path.is_file() or sha256_of(path) != hashes.get(path.name)):
            raise UserError(f"{path} is not as the export left it: name another --out")


def hf_tokenizer(path: Path, block_size: int) -> Any:
    """The tokenizer of transformers for tokenizer.json, with an <|endoftext|> before every text.

    Every training document follows one, so that gpt.generate begins with it as well.
    """
    tokenizers = extras.tokenizers()
    described = tokenizers.Tokenizer.from_file(str(path))
    described.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, described.token_to_id(END_OF_TEXT))],
    )
    return extras.transformers().PreTrainedTokenizerFast(
        tokenizer_object=described,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
    )


def write_hf(model: GPT, tokenizer: Tokenizer, theirs: Any, directory: Path) -> None:
    """A directory for from_pretrained; OSError when the disk is full."""
    end, shape = tokenizer.special_tokens[END_OF_TEXT], model.config
    exported = as_gpt2(model, end_of_text=end)
    exported.generation_config = extras.transformers().GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        max_length=shape.block_size,  # there are no further positions
        suppress_tokens=list(range(tokenizer.vocab_size, shape.vocab_size)) or None,  # padding of the head
    )
    try:
        exported.save_pretrained(directory)
    except SafetensorError as error:  # it reports a full disk under its own type
        raise OSError(errno.EIO, str(error), str(directory)) from error
    # tokenizers, which writes the same once more, raises a bare Exception when the disk is full.
    write_atomically(directory / "tokenizer.json", theirs.backend_tokenizer.to_str(pretty=True))
    theirs.save_pretrained(directory)


def compare(model: GPT, tokenizer: Tokenizer, kind: str, directory: Path) -> float:
    """The largest difference of logits between `model`, in float32, and what transformers reads.

    Raises UserError for one that rounding does not explain, and for ids that are not those of `tokenizer`.
    """
    library = extras.transformers()
    text = every_token(tokenizer)
    options: dict[str, Any] = {} if kind == "hf" else {"gguf_file": GGUF}
    ids = [tokenizer.special_tokens[END_OF_TEXT], *tokenizer.encode(text, allow_special=True).tolist()]
    if library.AutoTokenizer.from_pretrained(directory, **options)(text)["input_ids"] != ids:
        raise UserError("transformers reads other ids from the exported tokenizer: nothing was written")
    if kind == "gguf":
        options["config"] = library.AutoConfig.from_pretrained(directory, **options)
        options["config"].n_positions = options["config"].n_ctx  # under which name transformers reads it
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of GGUF's reader
        theirs = library.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    T = min(model.config.block_size, LONGEST)
    windows = torch.from_numpy(np.resize(np.array(ids), (-(-TOKENS // T), T)))
    with torch.no_grad():
        expected, found = model.logits(windows), theirs(input_ids=windows, use_cache=False).logits
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"the exported model's logits are off by {difference:.2g}, of at most {largest:.3g}: "
            "nothing was written"
        )
    print(f"logits of {windows.numel()} tokens: {difference:.1e} apart at most, the largest is {largest:.3g}")
    return difference


def every_token(tokenizer: Tokenizer) -> str:
    """The texts of all tokens in a random order, always the same one."""
    ids = np.random.default_rng(0).permutation(tokenizer.vocab_size)
    return tokenizer.decode(ids)


def main(arguments: list[str]) -> int:
    config = parse_options(ExportConfig, arguments, prog="python -m gpt.export")
    set_threads(config.threads)
    export(config)
    print(f"wrote {config.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_program(main)

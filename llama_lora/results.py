"""What a fine-tuning leaves for its reader: summary.json, a table and a plot."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gpt import checkpoint
from gpt.cli import print_titled, write_atomically
from gpt.hardware import device_name, gemm_peak_flops, versions
from gpt.metrics import UNTIMED_STEPS, read_records
from gpt.progress import plot
from gpt.resume import check_unchanged
from llama_lora.config import FinetuneConfig
from llama_lora.dataset import find_split
from llama_lora.trained import Trained

# A run that changes one of these is another run.
FIXED_ON_RESUME = (
    "method", "backend", "rank", "alpha", "target_modules", "block_size", "packing", "batch_size",
    "accumulation_steps", "optimizer_bits", "seed",
)  # fmt: skip


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; "auto" is bf16 where the hardware multiplies it."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def inputs(config: FinetuneConfig) -> dict[str, str]:
    """SHA-256, shortened, of the files that a run reads."""
    weights = "".join(map(checkpoint.sha256_of, sorted(config.model.glob("*.safetensors"))))
    digests = {
        "base model": hashlib.sha256(weights.encode()).hexdigest(),
        "tokenizer": checkpoint.sha256_of(config.model / "tokenizer.json"),
        "training data": checkpoint.sha256_of(find_split(config.data, "train")),
        "validation data": checkpoint.sha256_of(find_split(config.data, "val")),
    }
    return {name: digest[:12] for name, digest in digests.items()}


def check_same_run(config: FinetuneConfig, dtype: torch.dtype, start: Path, now: dict[str, str]) -> None:
    """Raise UserError naming the first setting or input that would make the resumed run another one."""
    state = checkpoint.read_state(start)
    before = {name: state["config"][name] for name in FIXED_ON_RESUME} | {"precision": state["precision"]}
    options = config.as_json() | {"target_modules": list(config.target_modules)}  # as JSON gives it back
    settings = {name: options[name] for name in FIXED_ON_RESUME} | {"precision": str(dtype)}
    # States of older runs name no inputs; the tokenizer is beside them.
    noted = {**now, "tokenizer": checkpoint.sha256_of(start / "tokenizer.json")[:12]}
    check_unchanged(before | state.get("inputs", noted), settings | now, start)


def finish(
    config: FinetuneConfig, dtype: torch.dtype, device: torch.device, model: Any, trained: Trained,
    peak_memory: int, console: Console,
) -> None:  # fmt: skip
    """Write summary.json and loss.png from metrics.jsonl, and print the table."""
    records = read_records(config.out / "metrics.jsonl")
    evaluated = [record for record in records if "val_loss" in record]
    base, best = evaluated[0]["val_loss"], min(record["val_loss"] for record in evaluated)
    steps = [record for record in records if "loss" in record]
    timed = steps[UNTIMED_STEPS:] or steps
    precision = "fp32" if dtype == torch.float32 else "bf16"
    peak_flops = gemm_peak_flops(device, precision)
    speed = statistics.median(record["tokens_per_second"] for record in timed)
    summary = {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "seconds": steps[-1]["seconds"],
        "tokens_per_second": speed,
        "step_ms_median": statistics.median(record["step_ms"] for record in timed),
        "train_loss": statistics.fmean(record["loss"] for record in steps[-20:]),
        "base_val_loss": base,
        "val_loss": evaluated[-1]["val_loss"],
        "best_val_loss": best,
        "base_perplexity": math.exp(base),
        "perplexity": math.exp(best),
        "perplexity_change": math.exp(best - base) - 1.0,
        "peak_memory_bytes": peak_memory,
        "model_bytes": model_bytes(model),
        "parameters": base_parameters(model.config),
        "trained_parameters": sum(p.numel() for _, p in trained.named_parameters()),
        "gemm_peak_flops": peak_flops,
        "mfu": flops_per_token(model.config, config) * speed / peak_flops,
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "text_sha256": checkpoint.sha256_of(find_split(config.data, "val")),
        "config": config.as_json(),
    }
    if device.type == "cuda":
        summary["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    write_atomically(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(config.out / "loss.png", plot({"": records}))
    print_table(summary, config)
    published = "model" if config.method == "full" else "adapter"
    if (config.out / published).is_dir():
        console.print(f"wrote {config.out}: {published}/, loss.png")
    else:
        console.print(
            f"wrote {config.out}: loss.png; no {published}/, as no evaluation was better than the base model"
        )


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def head_width(shape: Any) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def block_matrices(shape: Any) -> int:
    """Elements of the seven projections of a block."""
    heads = 2 * (shape.num_attention_heads + shape.num_key_value_heads) * head_width(shape)
    return shape.hidden_size * (heads + 3 * shape.intermediate_size)


def base_parameters(shape: Any) -> int:
    """Parameters of the base model, whatever form they are kept in."""
    embeddings = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    return shape.num_hidden_layers * block_matrices(shape) + embeddings + norms


def flops_per_token(shape: Any, config: FinetuneConfig) -> float:
    """Matrix products of a training token: forward and the gradient of the input, two flops each.

    Frozen weights need no gradient; with all weights training there is a third product. Attention counts the
    causal half of full blocks.
    """
    matrices = shape.num_hidden_layers * block_matrices(shape) + shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * head_width(shape)
    attention = 6 * shape.num_hidden_layers * config.block_size * width
    return (6.0 if config.method == "full" else 4.0) * matrices + attention


def print_table(summary: dict[str, Any], config: FinetuneConfig) -> None:
    table = Table()
    for column in ("", "base", "best"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("validation loss", f"{summary['base_val_loss']:.4f}", f"{summary['best_val_loss']:.4f}")
    table.add_row("perplexity", f"{summary['base_perplexity']:.3f}", f"{summary['perplexity']:.3f}")
    for label, text in (
        ("change of perplexity", f"{summary['perplexity_change']:+.1%}"),
        ("tokens/s, without padding", f"{summary['tokens_per_second']:,.0f}"),
        ("step, median", f"{summary['step_ms_median']:,.0f} ms"),
        ("of the GEMM peak", f"{summary['mfu']:.0%} of {summary['gemm_peak_flops'] / 1e9:,.0f} GFLOP/s"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB"),
        ("model", f"{summary['model_bytes'] / 1e6:,.0f} MB"),
        ("seconds", f"{summary['seconds']:,.0f}"),
    ):
        table.add_row(label, "", text)
    print_titled(f"{config.backend} {config.method} of {config.model}", table)

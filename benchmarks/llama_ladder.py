"""What each technique does to a fine-tuning: python -m benchmarks ladder --model llama --data DIR

Every rung is a run of `python -m llama_lora.finetune` of its own, of the same length on the same text, and is
asked for tokens as its model is afterwards, with and without a cache. A rung differs from the one before in
what its name says. The runs follow one another, so that the machine's drift is in their ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gpt.cli import UserError, wide_console, write_atomically
from gpt.hardware import fingerprint
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import get_backend, open_tokenizer
from llama_lora.generate import generate, load
from llama_lora.results import pick_dtype

PROMPT = "Participants noted that inflation"
NEW_TOKENS = 48


@dataclass(frozen=True)
class Rung:
    """A name and the options of the run; `sweep` marks those outside the ladder."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


HF = {"backend": "hf", "method": "lora", "optimizer-bits": "32"}
OURS = {"backend": "tapelm", "method": "lora", "precision": "bf16", "optimizer-bits": "32"}
QLORA = OURS | {"method": "qlora"}
LAST = QLORA | {"optimizer-bits": "8"}
RUNGS = (
    Rung("LoRA, float32", HF | {"precision": "fp32"}, ("--no-packing",)),
    Rung("bf16", HF | {"precision": "bf16"}, ("--no-packing",)),
    Rung("+ packing", HF | {"precision": "bf16"}),
    Rung("+ our kernels", OURS),
    Rung("+ torch.compile", OURS, ("--compile",)),
    Rung("QLoRA, not compiled", QLORA),
    Rung("+ 8-bit optimizer", LAST),
)
SWEEPS = (
    *(Rung(f"batch of {size}", LAST | {"batch-size": str(size)}) for size in (1, 2, 8)),
    *(Rung(f"rank {rank}", LAST | {"rank": str(rank), "alpha": str(rank)}) for rank in (8, 32)),
)


def run(model: Path, data: Path, out: Path, steps: int, *, sweeps: bool, json_path: Path | None) -> int:
    """Take all rungs that are not done in `out`, print the table and write it as JSON after each.

    Raises UserError where `out` has rungs of another model, other data or another number of steps.
    """
    device, console = torch.device("cpu" if not torch.cuda.is_available() else "cuda"), Console(stderr=True)
    results = []
    for index, rung in enumerate((*RUNGS, *(SWEEPS if sweeps else ()))):
        folder = out / f"{index:02d}"
        if not (folder / "ladder.json").is_file():
            console.print(f"{rung.name}: {folder}", highlight=False)
            take(rung, model, data, folder, steps)
            found = summary_of(rung, folder) | decode_latency(rung, model, folder, device)
            write_atomically(folder / "ladder.json", json.dumps(found, indent=1) + "\n")
        results.append(json.loads((folder / "ladder.json").read_text(encoding="utf-8")))
        refuse_another(folder, results[-1]["config"], model, data, steps)
        if json_path is not None:
            written = {"machine": fingerprint(device), "steps": steps, "rows": results}
            write_atomically(json_path, json.dumps(written, indent=1) + "\n")
    print_table(results, steps)
    return 0


def refuse_another(folder: Path, config: dict[str, Any], model: Path, data: Path, steps: int) -> None:
    wanted = {"model": str(model), "data": str(data), "max_steps": steps}
    if had := {name: config[name] for name, value in wanted.items() if config[name] != value}:
        told = ", ".join(f"{name} {value}" for name, value in had.items())
        raise UserError(f"{folder} is a run of {told}: choose another --out, or remove it to take it anew")


def take(rung: Rung, model: Path, data: Path, folder: Path, steps: int) -> None:
    options = [part for name, value in rung.options.items() for part in (f"--{name}", value)]
    command = [
        sys.executable, "-m", "llama_lora.finetune", "--model", str(model), "--data", str(data), "--out",
        str(folder), "--max-steps", str(steps), "--eval-rows", "16", "--resume", "auto",
        *options, *rung.flags,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise UserError(
            f"{rung.name} ended with status {done.returncode}; the same command goes on from here"
        )


def summary_of(rung: Rung, folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = (
        "tokens_per_second", "step_ms_median", "peak_memory_bytes", "base_perplexity", "perplexity",
        "model_bytes", "mfu",
    )  # fmt: skip
    return {"name": rung.name, **{name: summary[name] for name in names}, "config": summary["config"]}


def decode_latency(rung: Rung, model: Path, folder: Path, device: torch.device) -> dict[str, float]:
    """Milliseconds a token of NEW_TOKENS after PROMPT, batch of one, by whom the rung's backend decodes."""
    method, dtype = rung.options["method"], pick_dtype(rung.options["precision"], device)
    ids = open_tokenizer(model)(PROMPT)["input_ids"]
    found = {}
    if rung.options["backend"] == "tapelm":
        loaded, _ = load(folder / "adapter", model, method, dtype, device)
        for name, use_cache in (("decode_ms_cache", True), ("decode_ms_no_cache", False)):
            generate(loaded, [ids], max_new_tokens=2, use_cache=use_cache)  # kernels are compiled, not timed
            made = generate(loaded, [ids], max_new_tokens=NEW_TOKENS, use_cache=use_cache)
            found[name] = made.ms_per_token
        return found
    backend = get_backend("hf")
    recipe, _ = files.read_recipe(folder / "adapter")
    theirs: Any = backend.load(model, Recipe(method, recipe.rank, recipe.alpha), dtype, device)
    files.load(folder / "adapter", backend.adapters(theirs))
    prompt = torch.tensor([ids], device=device)
    for name, use_cache in (("decode_ms_cache", True), ("decode_ms_no_cache", False)):
        seconds = []
        # The first is not counted: kernels are compiled and loaded in it. One token is the prefill.
        for count in (2, 1, NEW_TOKENS):
            started = time.perf_counter()
            with torch.no_grad():
                theirs.eval().generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
                    min_new_tokens=count, do_sample=False, use_cache=use_cache,
                )  # fmt: skip
            seconds.append(time.perf_counter() - started)
        found[name] = 1e3 * (seconds[2] - seconds[1]) / (NEW_TOKENS - 1)
    return found


def print_table(results: list[dict[str, Any]], steps: int) -> None:
    table = Table(title=f"fine-tuning, {steps} steps each; perplexity of the base {base_range(results)}")
    columns = ("", "tokens/s", "", "step ms", "peak MB", "perplexity", "ms/token cached", "no cache", "MB")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    first = results[0]["tokens_per_second"]
    for row in results:
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / first:.2f}x",
            f"{row['step_ms_median']:,.0f}",
            f"{row['peak_memory_bytes'] / 1e6:,.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['decode_ms_cache']:.1f}",
            f"{row['decode_ms_no_cache']:.1f}",
            f"{row['model_bytes'] / 1e6:,.0f}",
        )
    wide_console().print(table)


def base_range(results: list[dict[str, Any]]) -> str:
    values = [row["base_perplexity"] for row in results]
    return f"{min(values):.3f} to {max(values):.3f}"

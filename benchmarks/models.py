"""The final table: runs of GPT and LLaMA beside each other, python -m benchmarks models RUN RUN ...

A run directory holds summary.json (gpt.train, llama_lora.finetune), and, where they were asked for,
evaluation.json and sample.json. Bits per byte makes different tokenizers comparable, on the same text only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.table_kinds import markdown
from gpt.cli import UserError, prepare_output, write_atomically

FILES = ("summary", "evaluation", "sample")


@dataclass(frozen=True)
class Column:
    """A figure of a run: the first of `paths` that its files have."""

    label: str
    paths: tuple[str, ...]
    show: Callable[[Any], str]


COLUMNS = (
    Column("validation loss", ("evaluation.total.loss", "summary.val_loss"), "{:.4f}".format),
    Column("perplexity", ("evaluation.total.perplexity", "summary.perplexity"), "{:.3f}".format),
    Column("bits per byte", ("evaluation.total.bits_per_byte", "summary.val_bits_per_byte"), "{:.4f}".format),
    Column("ms per new token", ("sample.ms_per_token",), "{:,.1f}".format),
    Column("model, MB", ("summary.model_bytes",), lambda number: f"{number / 1e6:,.1f}"),
    Column("peak memory, MB", ("summary.peak_memory_bytes",), lambda number: f"{number / 1e6:,.0f}"),
    Column("tokens/s", ("summary.tokens_per_second",), "{:,.0f}".format),
    Column("s of training", ("summary.seconds",), "{:,.0f}".format),
    Column("device", ("summary.device", "evaluation.machine.device"), str),
)


def read_run(directory: Path) -> dict[str, Any]:
    """The JSON files of a run that exist. Raises UserError when there is none, or one is broken."""
    found: dict[str, Any] = {}
    for name in FILES:
        path = directory / f"{name}.json"
        if path.is_file():
            try:
                found[name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is no JSON: {error}") from error
    if not found:
        raise UserError(
            f"no {', '.join(f'{name}.json' for name in FILES)} in {directory}: train or evaluate first"
        )
    return found


def scored_text(run: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the evaluation was of: split, limit, and the bytes of each domain; None when there was none."""
    evaluation = run.get("evaluation")
    if evaluation is None:
        return None
    domains = {name: row.get("bytes") for name, row in evaluation.get("domains", {}).items()}
    return evaluation.get("split"), evaluation.get("max_bytes"), tuple(sorted(domains.items()))


def look_up(run: dict[str, Any], path: str) -> Any:
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def build(runs: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per run; what a run has no file for is a dash.

    Raises UserError when the runs were evaluated on different text.
    """
    texts = {name: text for name, run in runs.items() if (text := scored_text(run)) is not None}
    if len(set(texts.values())) > 1:
        raise UserError(
            "the runs were evaluated on different text, so that their bits per byte say nothing: "
            + "; ".join(f"{name} {text[:2]}" for name, text in texts.items())
        )
    lines = []
    for name, run in runs.items():
        values = [next((v for p in c.paths if (v := look_up(run, p)) is not None), None) for c in COLUMNS]
        lines.append((name, *("-" if v is None else c.show(v) for c, v in zip(COLUMNS, values, strict=True))))
    return lines


def run(directories: Sequence[Path], out: Path | None) -> int:
    """`benchmarks models`: prints the table; with --out also OUT/models.md."""
    if not directories:
        raise UserError("models takes run directories: python -m benchmarks models runs/demo/plain ...")
    if out is not None:
        prepare_output(out / "models.md")
    lines = build({_name(path, directories): read_run(path) for path in directories})
    head = ("run", *(column.label for column in COLUMNS))
    table = Table(title="models on the same held-out text")
    for label in head:
        table.add_column(label, justify="left" if label in ("run", "device") else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 150).print(table)
    if out is not None:
        write_atomically(out / "models.md", markdown(head, lines))
    return 0


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The last part of the path, or all of it where two runs end alike."""
    return path.name if sum(other.name == path.name for other in paths) == 1 else str(path)

"""The final table: runs of GPT and LLaMA beside each other, python -m benchmarks models RUN RUN ...

A run directory holds summary.json (gpt.train, llama_lora.finetune), and, where they were asked for,
evaluation.json and sample.json. Bits per byte makes different tokenizers comparable, on the same text only,
which is known by its SHA-256. An evaluation scores all of it, or the bytes it was limited to; what a training
validates on is a part of it, which depends on the tokenizer: the table says which of them a loss is.
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


SCORES = {
    "evaluation": (
        Column("loss", ("evaluation.total.loss",), "{:.4f}".format),
        Column("perplexity", ("evaluation.total.perplexity",), "{:.3f}".format),
        Column("bits per byte", ("evaluation.total.bits_per_byte",), "{:.4f}".format),
    ),
    "training": (  # at the last step, of which the checkpoint is
        Column("loss", ("summary.val_loss",), "{:.4f}".format),
        Column("perplexity", (), str),
        Column("bits per byte", ("summary.val_bits_per_byte",), "{:.4f}".format),
    ),
    "fine-tuning": (  # at its best, of which the adapter is
        Column("loss", ("summary.best_val_loss",), "{:.4f}".format),
        Column("perplexity", ("summary.perplexity",), "{:.3f}".format),
        Column("bits per byte", (), str),
    ),
}
COLUMNS = (
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


@dataclass(frozen=True)
class Scored:
    """What the loss of a run is of."""

    by: str
    """evaluation, or training or fine-tuning where there was none."""
    text: str | None
    """SHA-256; None in files of earlier versions."""
    part: str

    @classmethod
    def of(cls, run: dict[str, Any]) -> Scored | None:
        """None where the run only has a sample."""
        if (evaluation := run.get("evaluation")) is not None:
            limit = evaluation.get("max_bytes")
            part = f"{evaluation['split']}, {limit:,} bytes a source" if limit else evaluation["split"]
            return cls("evaluation", evaluation.get("text_sha256"), part)
        if (summary := run.get("summary")) is not None:
            by = "fine-tuning" if "base_val_loss" in summary else "training"
            return cls(by, summary.get("text_sha256"), "part of val")
        return None

    def __str__(self) -> str:
        return f"{self.by}: {self.part} of {self.text[:8] if self.text else 'unknown text'}"


def look_up(run: dict[str, Any], path: str) -> Any:
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def build(runs: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A line per run; what a run has no file for is a dash.

    Raises UserError when losses are of different texts, or evaluations of different parts of one.
    """
    scored = {name: found for name, run in runs.items() if (found := Scored.of(run)) is not None}
    texts = {found.text for found in scored.values()} - {None}
    parts = {found.part for found in scored.values() if found.by == "evaluation"}
    if len(texts) > 1 or len(parts) > 1:
        raise UserError(
            "the losses of these runs are of different text and cannot be compared: "
            + "; ".join(f"{name} {found}" for name, found in scored.items())
            + ". Evaluate or train them on the same --data, with the same --split and --max-bytes"
        )
    lines = []
    for name, run in runs.items():
        found = scored.get(name)
        scores = SCORES[found.by if found else "training"]
        cells = [_cell(run, column) for column in (*scores, *COLUMNS)]
        lines.append((name, *cells[: len(scores)], str(found or "-"), *cells[len(scores) :]))
    return lines


def remarks(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What keeps the losses from being compared as they stand."""
    scored = [found for run in runs.values() if (found := Scored.of(run)) is not None]
    found = []
    if len({each.by for each in scored}) > 1:
        found.append(
            "Losses are of different parts of the text: an evaluation scores all of it or what it was "
            "limited to, training and fine-tuning what they validate on."
        )
    if len(scored) > 1 and any(each.text is None for each in scored):
        found.append(
            "Unknown text: a file of an earlier version does not say what its loss is of, so that it may be "
            "of another text."
        )
    return found


def _cell(run: dict[str, Any], column: Column) -> str:
    value = next((value for path in column.paths if (value := look_up(run, path)) is not None), None)
    return "-" if value is None else column.show(value)


def run(directories: Sequence[Path], out: Path | None) -> int:
    """`benchmarks models`: prints the table; with --out also OUT/models.md."""
    if not directories:
        raise UserError("models takes run directories: python -m benchmarks models runs/demo/plain ...")
    if out is not None:
        prepare_output(out / "models.md")
    runs = {_name(path, directories): read_run(path) for path in directories}
    lines, notes = build(runs), remarks(runs)
    of = "loss of"
    head = ("run", *(c.label for c in SCORES["evaluation"]), of, *(column.label for column in COLUMNS))
    table = Table(title="models on held-out text")
    for label in head:
        table.add_column(label, justify="left" if label in ("run", of, "device") else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=None if Console().is_terminal else 170).print(table)
    print("".join(f"{note}\n" for note in notes), end="")
    if out is not None:
        text = markdown(head, lines) + "".join(f"\n{note}\n" for note in notes)
        write_atomically(out / "models.md", text)
    return 0


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The last part of the path, or all of it where two runs end alike."""
    return path.name if sum(other.name == path.name for other in paths) == 1 else str(path)

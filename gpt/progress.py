"""What a person sees of a training: a bar on a terminal; in a log file lines, and a plot at the end."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_OF_SILENCE = 30.0
"""So long a log file is left without a line, if the steps are no longer."""


class TrainingProgress:
    """Shows the records of metrics.jsonl as they are made; a context manager."""

    def __init__(self, console: Console, total: int, completed: int) -> None:
        self.console, self._said = console, time.monotonic()
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal or console.quiet,
        )
        self._task = self._bar.add_task("", total=total, completed=completed, status="first step")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, record: Mapping[str, Any]) -> None:
        """`record` has step, loss and tokens_per_second, and val_loss where there was a validation."""
        loss, speed = f"loss {record['loss']:.4f}", f"{record['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=record["step"], status=f"{loss} {speed}")
        silent = time.monotonic() - self._said
        if self.console.is_terminal or ("val_loss" not in record and silent < SECONDS_OF_SILENCE):
            return
        val = f", {validation_text(record['val_loss'])}" if "val_loss" in record else ""
        self.console.print(f"step {record['step']}: {loss}{val}, {speed}")
        self._said = time.monotonic()


def validation_text(loss: float) -> str:
    """A validation loss, in nats per token, and its perplexity."""
    return f"val loss {loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f})"


def plot(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    x: str = "step",
    x_label: str = "step",
    styles: Mapping[str, tuple[str, float]] | None = None,
) -> bytes:
    """A PNG with losses on the left and tokens per second on the right, of the records of each run by name.

    `styles` has a colour and a line width by name; one run alone may be called "".
    """
    import matplotlib  # takes half a second, which a program need not wait for at its start

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    for number, (name, records) in enumerate(runs.items()):
        colour, width = (styles or {}).get(name, (f"C{number}", 0.8))
        prefix = f"{name}, " if name else ""
        steps = [record for record in records if "loss" in record]
        evaluated = [record for record in records if "val_loss" in record]
        xs = [record[x] for record in steps]
        left.plot(xs, [r["loss"] for r in steps], color=colour, linewidth=width, label=f"{prefix}train")
        places, losses = [r[x] for r in evaluated], [r["val_loss"] for r in evaluated]
        marks = {"color": colour, "markersize": 3 + width, "label": f"{prefix}val"}
        left.plot(places, losses, "--o", **marks)
        right.plot(xs, [r["tokens_per_second"] for r in steps], color=colour, label=name)
    left.set(xlabel=x_label, ylabel="loss, nats per token")
    right.set(xlabel=x_label, ylabel="tokens per second")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is left or any(runs):
            axes.legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    return image.getvalue()

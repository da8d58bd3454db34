"""metrics.jsonl: one JSON line for every training step, read back for the summary."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

from gpt.cli import UserError, write_atomically

# The first steps compile, allocate and fill caches; they are left out of the median step time.
UNTIMED_STEPS = 3
PLOTTED = ("loss", "lr", "grad_norm", "tokens_per_second", "val_loss")  # by TensorBoard


def keep_up_to(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a last line cut short by a crash."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        kept = [line for number, line in enumerate(lines) if _record(path, number, line)["step"] <= step]
        write_atomically(path, "".join(kept))


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        return record | {"step": int(record["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}, line {number + 1}, is no record of a step: remove the line") from error


def check_finite(record: dict[str, Any]) -> None:
    """Raise UserError naming the loss or norm of a step that is no number any more."""
    for name in ("loss", "grad_norm", "val_loss"):
        if not math.isfinite(record.get(name, 0.0)):
            step, value = record["step"], record[name]
            raise UserError(f"the {name} became {value} at step {step}: lower --learning-rate")


def add_scalars(tensorboard: Any, record: dict[str, Any]) -> None:
    """What TensorBoard shows of a step's record; nothing where it is None."""
    for name in PLOTTED:
        if tensorboard is not None and name in record:
            tensorboard.add_scalar(name, record[name], record["step"])


def risen(records: list[dict[str, Any]]) -> str | None:
    """A warning for a run whose validation loss ends a hundredth or more above its best."""
    evaluated = [(record["val_loss"], record["step"]) for record in records if "val_loss" in record]
    (best, step), last = min(evaluated), evaluated[-1][0]
    if last <= 1.01 * best:
        return None
    return (
        f"warning: the validation loss was {best:.4f} at step {step} and is {last:.4f} now: since then the "
        f"model learns train by heart; --max-steps {step} ends there"
    )


def append_record(path: Path, record: dict[str, Any]) -> None:
    """The file appears with its first record."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [_record(path, number, line) for number, line in enumerate(lines)]


def summarize(path: Path, step: int) -> dict[str, Any]:
    """The result of a run up to `step`. Raises UserError when the records end elsewhere."""
    records = read_records(path)
    last = records[-1]["step"] if records else 0
    if last != step or not any("val_loss" in record for record in records):
        raise UserError(
            f"{path} ends at step {last}, the run at {step}: lines are missing, so that there is no summary; "
            "the checkpoints are whole"
        )
    timed = records[UNTIMED_STEPS:] or records
    return {
        "steps": records[-1]["step"],
        "tokens": records[-1]["tokens"],
        "seconds": records[-1]["seconds"],
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed),
        "step_ms_median": statistics.median(record["step_ms"] for record in timed),
        "train_loss": statistics.fmean(record["loss"] for record in records[-20:]),
        "final_step_loss": records[-1]["loss"],
        "val_loss": [record["val_loss"] for record in records if "val_loss" in record][-1],
    }


def summary_is_of(path: Path, step: int) -> bool:
    """Whether there is a summary of the run up to `step`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["steps"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_tensorboard(out: Path) -> Any:
    """A SummaryWriter when TensorBoard is installed, else None: metrics.jsonl has the numbers either way."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"))

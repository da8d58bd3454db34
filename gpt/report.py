"""One page about two runs: python -m gpt.report --plain RUN --optimized RUN --out DIR

Each run directory holds summary.json and metrics.jsonl (gpt.train), evaluation.json (gpt.evaluate) and
sample.json (gpt.generate). Writes DIR/report.json and DIR/report.html, whose plots are inlined.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import base64
import dataclasses
import datetime
import html
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from gpt.cli import UserError, parse_options, print_titled, run_program, wide_console, write_atomically
from gpt.progress import plot

RUNS = ("plain", "optimized")
COLOURS = {"plain": "#9aa0a8", "optimized": "#1668b8"}
WIDTHS = {"plain": 3.0, "optimized": 1.0}  # equal losses stay visible under each other


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Puts two trainings side by side: tables, plots and samples in report.json and report.html."""

    plain: Path
    """Run directory of the plain GPT."""
    optimized: Path
    """Run directory of the optimized one."""
    out: Path
    """Directory of the report."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: where its number is found in a run, and how it is printed."""

    label: str
    path: tuple[str, ...]
    show: Callable[[float], str]


def _megabytes(number: float) -> str:
    return f"{number / 1e6:,.1f} MB"


ROWS = (
    Row("tokens/s", ("summary", "tokens_per_second"), "{:,.0f}".format),
    Row("step, median", ("summary", "step_ms_median"), "{:,.1f} ms".format),
    Row("MFU (of the GEMM peak here)", ("summary", "mfu"), "{:.1%}".format),
    Row("train loss, last 20 steps", ("summary", "train_loss"), "{:.4f}".format),
    Row("val loss, last", ("summary", "val_loss"), "{:.4f}".format),
    Row("perplexity, evaluation", ("evaluation", "total", "perplexity"), "{:.3f}".format),
    Row("bits per byte, evaluation", ("evaluation", "total", "bits_per_byte"), "{:.4f}".format),
    Row("peak memory", ("summary", "peak_memory_bytes"), _megabytes),
    Row("model size", ("summary", "model_bytes"), _megabytes),
    Row("generation, per token", ("sample", "ms_per_token"), "{:,.2f} ms".format),
    Row("generated tokens", ("sample", "new_tokens"), "{:,.0f}".format),
    Row("generated tokens/s", ("sample", "tokens_per_second"), "{:,.1f}".format),
    Row("seconds of training", ("summary", "seconds"), "{:,.1f}".format),
)


# What files written by an earlier version lack.
NEEDED = {
    "summary": ("date", "model", "config"),
    "evaluation": ("max_bytes", "step"),
    "sample": ("ms_per_token",),
}


def read_run(directory: Path) -> dict[str, Any]:
    """summary, evaluation, sample and step records of a run. Raises UserError for a missing file."""
    run: dict[str, Any] = {}
    for name in ("summary", "evaluation", "sample"):
        path = directory / f"{name}.json"
        if not path.is_file():
            raise UserError(f"no {name}.json in {directory}: train, evaluate and generate first")
        run[name] = json.loads(path.read_text(encoding="utf-8"))
        if missing := {key for key in NEEDED[name] if key not in run[name]}:
            raise UserError(f"{path} has no {', '.join(sorted(missing))}: make it again with this version")
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    run["metrics"] = [json.loads(line) for line in lines]
    return run


def build(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of report.json from read_run() of "plain" and "optimized"."""
    scored = [{key: runs[name]["evaluation"][key] for key in ("split", "max_bytes")} for name in RUNS]
    if scored[0] != scored[1]:
        raise UserError(f"the runs were evaluated on different text: {scored[0]} and {scored[1]}")
    summaries = {name: runs[name]["summary"] for name in RUNS}
    for name in RUNS:
        if (kernels := summaries[name]["config"]["kernels"]) != name:
            raise UserError(f"--{name} is a run with --kernels {kernels}")
        if (evaluated := runs[name]["evaluation"]["step"]) != (trained := runs[name]["metrics"][-1]["step"]):
            raise UserError(
                f"{name} was evaluated at step {evaluated} and trained to {trained}: evaluate again"
            )
    models = [{**summaries[name]["model"], "seed": summaries[name]["config"]["seed"]} for name in RUNS]
    if models[0] != models[1]:
        raise UserError(f"the runs are of different models: {models[0]} and {models[1]}")
    table = []
    for row in ROWS:
        numbers = {}
        for name in RUNS:
            value: Any = runs[name]
            for key in row.path:
                value = value[key]
            numbers[name] = float(value)
        ratio = numbers["optimized"] / numbers["plain"] if numbers["plain"] else None
        table.append({"metric": row.label, **numbers, "ratio": ratio})
    return {
        "dates": {name: summaries[name]["date"] for name in RUNS},
        "machine": f"{summaries['plain']['device']}, {platform.system()} {platform.machine()}",
        "versions": summaries["optimized"]["versions"],
        "same_batches": summaries["plain"]["batches_sha256"] == summaries["optimized"]["batches_sha256"],
        "batches_sha256": {name: summaries[name]["batches_sha256"] for name in RUNS},
        "precision": {name: summaries[name]["precision"] for name in RUNS},
        "speedup": summaries["optimized"]["tokens_per_second"] / summaries["plain"]["tokens_per_second"],
        "val_loss_apart": abs(summaries["optimized"]["val_loss"] / summaries["plain"]["val_loss"] - 1),
        "table": table,
        "runs": {
            name: {key: runs[name][key] for key in ("summary", "evaluation", "sample")} for name in RUNS
        },
    }


def shown_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """(metric, plain, optimized, ratio) as printed, numbers formatted, with the device last."""
    rows: list[tuple[str, ...]] = []
    for row, values in zip(ROWS, report["table"], strict=True):
        ratio = "" if values["ratio"] is None else f"{values['ratio']:.3f}×"
        rows.append((row.label, row.show(values["plain"]), row.show(values["optimized"]), ratio))
    devices = [report["runs"][name]["summary"]["device"] for name in RUNS]
    precisions = [report["precision"][name] for name in RUNS]
    dates = [
        datetime.datetime.fromisoformat(report["dates"][name]).strftime("%Y-%m-%d %H:%M UTC") for name in RUNS
    ]
    return [*rows, ("precision", *precisions, ""), ("device", *devices, ""), ("trained", *dates, "")]


def scored_text(report: dict[str, Any]) -> str:
    """What the bits per byte are of, for headings."""
    evaluation = report["runs"]["plain"]["evaluation"]
    limit, split = evaluation["max_bytes"], evaluation["split"]
    return f"the first {limit:,} bytes of each domain of the {split} split" if limit else f"the {split} split"


def domain_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """(domain, plain, optimized, unigram, bz2, xz) in bits per byte; the total last."""
    plain, optimized = (report["runs"][name]["evaluation"] for name in RUNS)
    rows = []
    for name in (*plain["domains"], "total"):
        of_plain = plain["total"] if name == "total" else plain["domains"][name]
        of_optimized = optimized["total"] if name == "total" else optimized["domains"][name]
        others = [of_plain[f"{key}_bits_per_byte"] for key in ("unigram", "bz2", "xz")]
        numbers = [of_plain["bits_per_byte"], of_optimized["bits_per_byte"], *others]
        rows.append((name, *(f"{number:.3f}" for number in numbers)))
    return rows


def plot_runs(runs: dict[str, dict[str, Any]], x: str, x_label: str) -> bytes:
    styles = {name: (COLOURS[name], WIDTHS[name]) for name in RUNS}
    return plot({name: runs[name]["metrics"] for name in RUNS}, x, x_label, styles)


SEQUENTIAL = (
    "The trainings ran one after the other, so that the machine's own drift is in the ratio; "
    "for one measured in turn: .venv/bin/python -m benchmarks train."
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1f24; }
body { max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid #e3e5e8; }
th:first-child, td:first-child { text-align: left; } td + td { white-space: nowrap; }
img { width: 100%; }
blockquote { margin: 0; white-space: pre-wrap; background: #f5f6f7; padding: .8rem 1rem; }
.note { color: #5b626c; } .scroll { overflow-x: auto; }
"""


def to_html(report: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """A self-contained page."""
    images = [
        f'<img alt="loss and tokens per second over {label}" '
        f'src="data:image/png;base64,{base64.b64encode(plot_runs(runs, x, label)).decode()}">'
        for x, label in (("step", "step"), ("seconds", "seconds of training"))
    ]
    batches = "the same batches in the same order" if report["same_batches"] else "DIFFERENT batches"
    samples = "".join(
        f"<h3>{name}</h3><blockquote>{html.escape(report['runs'][name]['sample']['text'])}</blockquote>"
        for name in RUNS
    )
    listed = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    notes = f"{report['machine']}. {listed}."
    plain, optimized = (html.escape(report["precision"][name]) for name in RUNS)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Plain and optimized GPT</title><style>{STYLE}</style></head>
<body>
<h1>The optimized GPT ({optimized}) trains {report["speedup"]:.2f}× as fast as the plain one ({plain})</h1>
<p>Same model, same initial weights; both runs saw {batches}
(SHA-256 {html.escape(report["batches_sha256"]["plain"][:16])}…). Their validation losses ended
{report["val_loss_apart"]:.2%} apart. {SEQUENTIAL}</p>
<p class="note">{html.escape(notes)}</p>
{html_table(("", *RUNS, "ratio"), shown_rows(report))}
<h2>Training</h2>{"".join(images)}
<h2>Bits per byte on {html.escape(scored_text(report))}</h2>
{html_table(("domain", *RUNS, "unigram tokens", "bz2 -9", "xz -9"), domain_rows(report))}
<p class="note">Compressors see exactly the bytes the models are scored on; the unigram model counts training
tokens.</p>
<h2>Samples</h2>{samples}
</body></html>
"""


def html_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of text, escaped."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def print_report(report: dict[str, Any]) -> None:
    console = wide_console()
    batches = "same batches, same order" if report["same_batches"] else "DIFFERENT BATCHES"
    comparison = Table()
    for number, name in enumerate(("", *RUNS, "ratio")):
        comparison.add_column(name, justify="left" if number == 0 else "right")
    for row in shown_rows(report):
        comparison.add_row(*row)
    domains = Table()
    for number, name in enumerate(("domain", *RUNS, "unigram", "bz2 -9", "xz -9")):
        domains.add_column(name, justify="left" if number == 0 else "right")
    for row in domain_rows(report):
        domains.add_row(*row)
    print_titled(f"plain and optimized: {batches}", comparison, console)
    apart = f"The validation losses ended {report['val_loss_apart']:.2%} apart."
    console.print(apart, SEQUENTIAL, "\n", highlight=False)
    print_titled(f"bits per byte on {scored_text(report)}", domains, console)


def write_report(config: ReportConfig) -> dict[str, Any]:
    runs = {"plain": read_run(config.plain), "optimized": read_run(config.optimized)}
    report = build(runs)
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.out / "report.html", to_html(report, runs))
    write_atomically(config.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def main(arguments: list[str]) -> int:
    config = parse_options(ReportConfig, arguments, prog="python -m gpt.report")
    print_report(write_report(config))
    return 0


if __name__ == "__main__":
    run_program(main)

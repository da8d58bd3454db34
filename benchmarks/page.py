"""The report of `benchmarks all`: one self-contained HTML page, and its tables as Markdown."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import table_kinds, tables
from benchmarks.compare import Results
from benchmarks.harness import Row, impossible
from gpt.cli import write_atomically
from gpt.report import STYLE, html_table

OURS, PEER = "#1668b8", "#9aa0a8"
Draw = Callable[[Any, Results], None]


def rows_of(results: Results, prefix: str) -> list[Row]:
    return [row for row in results.rows if row.subject.startswith(prefix)]


def section_of(results: Results, title: str) -> dict[str, Any]:
    """What the JSON holds of a ladder beside its rows."""
    return next(section for section in results.content["ladders"] if section["title"] == title)


def roofline(axes: Any, results: Results) -> None:
    """Measured time of every op over the time its work takes at the ceiling of its row."""
    rows = [
        row
        for row in results.rows
        if row.fraction_of_ceiling > 0 and not row.subject.startswith(table_kinds.NOT_OPS)
    ]
    for name, colour, mark, wanted in (("peers", PEER, "x", False), ("tapelm", OURS, "o", True)):
        points = [row for row in rows if ("tapelm" in row.variant or "ours" in row.variant) is wanted]
        predicted = [row.median_ms * row.fraction_of_ceiling for row in points]
        axes.scatter(
            predicted, [row.median_ms for row in points], s=22, c=colour, marker=mark, label=name, alpha=0.8
        )
    limits = [row.median_ms * min(1, row.fraction_of_ceiling) for row in rows]
    ends = [min(limits) / 1.5, max(row.median_ms for row in rows) * 1.5]
    for factor, style in ((1, "-"), (2, "--"), (10, ":")):
        label = "the ceiling" if factor == 1 else f"{factor} times its time"
        axes.plot(ends, [factor * end for end in ends], style, color="#555", linewidth=0.8, label=label)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="predicted from the ceiling, ms", ylabel="measured, ms", title="Every op and its ceiling")
    axes.legend(frameon=False, fontsize=8)


def colours(rungs: Sequence[str]) -> list[str]:
    """OURS from the first rung of a ladder on that is called ours, PEER before it."""
    first = next((place for place, name in enumerate(rungs) if "our" in name.split()), len(rungs))
    return [PEER] * first + [OURS] * (len(rungs) - first)


def bars(axes: Any, rows: Sequence[Row], numbers: Sequence[float], show: str, title: str) -> None:
    """Horizontal bars, the first row on top, with their figures at the ends."""
    names = [row.variant for row in rows]
    axes.barh(range(len(rows)), numbers, color=colours(names))
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    for place, number in enumerate(numbers):
        axes.text(number, place, " " + show.format(number), va="center", fontsize=8)
    axes.margins(x=0.15)
    axes.set_title(title)


def ladder_bars(axes: Any, results: Results, title: str) -> None:
    rows = rows_of(results, f"ladder {title}")
    speeds = [row.extra["tokens_per_second"] for row in rows]
    bars(
        axes,
        rows,
        speeds,
        "{:,.0f}",
        "Tokens per second, one optimization more on every line (blue: our kernels)",
    )


def removal_bars(axes: Any, results: Results, title: str) -> None:
    rows = rows_of(results, f"removal {title}")[1:]
    slower = [100 * (1 / next(iter(row.ratio_vs.values())) - 1) for row in rows]
    bars(axes, rows, slower, "{:+.0f}%", "How much longer a step takes without one of them")


def memory_bars(axes: Any, results: Results, title: str) -> None:
    rows = [row for row in rows_of(results, f"ladder {title}") if "peak_memory_bytes" in row.extra]
    peaks = [row.extra["peak_memory_bytes"] / 1e6 for row in rows]
    bars(axes, rows, peaks, "{:,.0f}", "Peak memory of training, MB (blue: our kernels)")


def loss_curves(axes: Any, results: Results, title: str) -> None:
    curves = section_of(results, title)["losses"]
    for place, (name, losses) in enumerate(curves.items()):
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            label=name,
            color=matplotlib.colormaps["viridis"](place / len(curves)),
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Losses of the same weights and batches")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def speed_over_time(axes: Any, results: Results, title: str) -> None:
    section = section_of(results, title)
    tokens = {
        row.variant: row.extra["tokens_per_second"] * row.median_ms / 1e3
        for row in rows_of(results, f"ladder {title}")
    }
    for place, (name, seconds) in enumerate(section["step_seconds"].items()):
        colour = matplotlib.colormaps["viridis"](place / len(tokens))
        axes.plot(
            range(1, len(seconds) + 1), [tokens[name] / each for each in seconds], label=name, color=colour
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="round", ylabel="tokens per second", title="Tokens per second in each round")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def draw(plot: Draw, results: Results, height: float) -> str:
    """An image tag with the PNG inlined."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9.5, height), constrained_layout=True)
    plot(axes, results)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    pyplot.close(figure)
    name = html.escape(axes.get_title())
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}">'


def to_html(results: Results) -> str:
    """The page; parts whose rows are missing are left out."""
    ladders = results.content.get("ladders", ())
    parts = [_gains(results, section) for section in ladders]
    ops = any(
        row.fraction_of_ceiling > 0 and not row.subject.startswith(table_kinds.NOT_OPS)
        for row in results.rows
    )
    if ops:
        parts.append("<h2>Speed-ups over PyTorch, all shapes</h2>")
        parts.append(_from_markdown(table_kinds.summary(results)))
    for section in ladders:
        parts += _ladder(results, section)
    for prefix, title, table in (
        ("peers ", "Other trainers", table_kinds.peers),
        ("decode ", "Generating text", table_kinds.generation),
        ("cold", "Tokenizers", table_kinds.tokenizer),
        ("loader", "Loaders", table_kinds.loader),
    ):
        if rows_of(results, prefix):
            parts.append(f"<h2>{title}</h2>" + _from_markdown(table(results)))
    if ops:
        parts.append("<h2>Kernels</h2>" + draw(roofline, results, 5.5))
        parts.append(_from_markdown(table_kinds.ops(results)))
    above = "".join(
        f"<li>{html.escape(f'{row.subject} {row.shape}, {row.variant}')}: {row.fraction_of_ceiling:.0%}</li>"
        for row in impossible(results.rows)
    )
    if above:
        parts.append(
            "<h2>Above the ceiling</h2><p>Nothing is faster than its limit: these data lie in a cache, or "
            f"the machine was busy when the ceiling was measured.</p><ul>{above}</ul>"
        )
    versions = ", ".join(f"{name} {version}" for name, version in results.machine["versions"].items())
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>tapelm benchmarks</title><style>{STYLE}</style></head>
<body>
<h1>What each optimization buys on this machine</h1>
<p>{html.escape(tables.stamp(results).replace("`", ""))}. Medians of rounds in which everything takes turns;
load {results.machine["load_average"]:.1f} at the end.</p>
<p class="note">{html.escape(versions)}</p>
{"".join(parts)}
</body></html>
"""


def _gains(results: Results, section: dict[str, Any]) -> str:
    """The sentence on a ladder that opens the page."""
    title, first = section["title"], rows_of(results, f"ladder {section['title']}")[0]
    return (
        f"<p>A training step of {html.escape(title)}, {first.shape} tokens: {section['total']:.2f} times "
        f"as fast as {html.escape(first.variant)}.</p>"
    )


def _ladder(results: Results, section: dict[str, Any]) -> list[str]:
    """The part of the page about one ladder."""
    title = section["title"]
    rows = rows_of(results, f"ladder {title}")
    height = 0.8 + 0.32 * len(rows)
    skipped = html.escape("; ".join(section["skipped"]))
    parts = [
        f"<h2>The training step, {html.escape(title)}, {rows[0].shape} tokens</h2>",
        draw(partial(ladder_bars, title=title), results, height),
        _from_markdown(table_kinds.ladder_of(results, section)),
        f"<p class='note'>left out: {skipped}</p>" if skipped else "",
    ]
    if removed := rows_of(results, f"removal {title}"):
        parts.append(draw(partial(removal_bars, title=title), results, 0.8 + 0.32 * len(removed)))
    if any("peak_memory_bytes" in row.extra for row in rows):
        parts.append(draw(partial(memory_bars, title=title), results, height))
    parts.append(draw(partial(loss_curves, title=title), results, 4.2))
    return [*parts, draw(partial(speed_over_time, title=title), results, 4.4)]


def _from_markdown(text: str) -> str:
    """The table and the sentences after it, of table_kinds.markdown."""
    lines = text.splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("| ").split("|")) for line in lines if line[:1] == "|"]
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line and line[0] != "|")
    return html_table(cells[0], [row for row in cells[2:]]) + said


def write(results: Results, folder: Path) -> Path:
    """FOLDER/index.html and FOLDER/tables.md from FOLDER/results.json; returns the page."""
    kinds = {
        "ladder": "ladder",
        "removal": "removal",
        "train": "steps",
        "peers ": "peers",
        "decode ": "generation",
        "cold": "tokenizer",
        "loader": "loader",
    }
    present = [kind for prefix, kind in kinds.items() if rows_of(results, prefix)]
    text = "\n".join(tables.table(kind, results) for kind in (*present, "summary", "ops"))
    write_atomically(folder / "tables.md", text)
    write_atomically(folder / "index.html", to_html(results))
    return folder / "index.html"

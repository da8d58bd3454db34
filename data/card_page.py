"""data_card.html: the data card as a page, with documents and tokens over time."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from data.card import is_tape, left_out_of
from data.documents import SPLITS
from data.numbers import PHASES
from gpt.report import STYLE, html_table

MOST_DOMAINS = 10
"""With a colour of their own in the plot."""


def write_page(path: Path, card: Mapping[str, Any]) -> None:
    """Write the page of a card; the same card gives the same bytes. Raises OSError."""
    path.write_text(to_html(card), encoding="utf-8")


def to_html(card: Mapping[str, Any]) -> str:
    """A self-contained page."""
    dates = card["split_dates"]
    cuts = (
        f"Validation from {dates['validation_from']}, test from {dates['test_from']}, "
        f"until {dates['until'] or 'the end'}."
        if dates
        else "Split by hash of the text."
    )
    tape = is_tape(card)
    if tape:
        cuts += f" {card['left_out_documents']:,} rows belong to no split ({left_out_of(card)})."
        cuts += f" Train tells its rows up to {PHASES} times, in runs that end at different rows."
    else:
        gap = f" ({left_out_of(card)})" if dates else ""
        cuts += f" {card['left_out_documents']:,} documents belong to no split{gap}, "
        cuts += f"{card['undated_documents']:,} have no date."
    if (given := card["settings"].get("tokenizer")) is not None:
        cuts += f" The tokenizer was given, not trained on this text; its SHA-256 is {given}."
    warnings = "".join(f"<p><b>Warning:</b> {html.escape(text)}</p>" for text in card["warnings"])
    domains = [(name, entry["what"], entry["licence"]) for name, entry in card["domains"].items()]
    dropped = [
        (source, reason, f"{count:,}")
        for source, reasons in card["dropped_documents"].items()
        for reason, count in reasons.items()
    ]
    rows = [
        (kind, f"{entry['count']:,}", "; ".join(entry["first"])) for kind, entry in card["bad_rows"].items()
    ]
    inputs = [(name, digest) for name, digest in card["inputs"].items()]
    outputs = [(name, f"{entry['bytes']:,}", entry["sha256"]) for name, entry in card["outputs"].items()]
    units = ("runs of rows", "rows") if tape else ("documents", "bytes")
    leaks = (
        f"<p>{tape_check(card)}</p>"
        if tape
        else _table(("split", "13-grams", "seen in train", "most in a document"), leak_rows(card))
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Data card</title><style>{STYLE}</style></head>
<body>
<h1>Data card</h1>
<p>{html.escape(cuts)}</p>
{warnings}
{_table(("split", "domain", *units, "tokens", "released"), split_rows(card))}
{plot(card)}
<h2>Domains</h2>{_table(("domain", "what", "licence"), domains)}
<h2>Leak check</h2>{leaks}
<h2>Dropped documents</h2>{_table(("domain", "reason", "documents"), dropped)}
<h2>Bad rows</h2>{_table(("kind", "rows", "first"), rows)}
<h2>Inputs</h2>{_table(("input", "SHA-256"), inputs)}
<h2>Outputs</h2>{_table(("file", "bytes", "SHA-256"), outputs)}
<p class="note">Fingerprint of settings and inputs: {html.escape(card["fingerprint"])}</p>
</body></html>
"""


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return html_table(header, rows) if rows else "<p>none</p>"


def tape_check(card: Mapping[str, Any]) -> str:
    """What was checked of a tape of numbers."""
    found = card["leak_check"]
    return (
        f"{found['rows']:,} rows: each on a day of its split, bins fitted on train, volatility from the rows "
        f"before, {found['embargo_rows']} rows between two splits."
    )


def split_rows(card: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(split, domain, documents, bytes, tokens, time span) as printed."""
    rows = []
    for split in SPLITS:
        for source, tally in card["splits"][split].items():
            span = f"{tally['first']} to {tally['last']}" if tally["first"] else "no dates"
            counts = (f"{tally[name]:,}" for name in ("documents", "bytes", "tokens"))
            rows.append((split, source, *counts, span))
    return rows


def leak_rows(card: Mapping[str, Any]) -> list[tuple[str, ...]]:
    checked = {name: entry for name, entry in card["leak_check"].items() if isinstance(entry, dict)}
    return [
        (
            split,
            f"{entry['grams']:,}",
            f"{entry['seen_in_train'] / max(1, entry['grams']):.2%}",
            f"{entry['highest_overlap']:.1%}",
        )
        for split, entry in checked.items()
    ]


def plot(card: Mapping[str, Any]) -> str:
    """SVG of documents and tokens by year of release, stacked by domain; nothing where there are no dates.

    Of more domains than a legend holds the largest have their own colour.
    """
    totals: dict[str, dict[str, dict[int, int]]] = {"documents": {}, "tokens": {}}
    for split in SPLITS:
        for source, tally in card["splits"][split].items():
            for what, by_source in totals.items():
                years = by_source.setdefault(source, {})
                for year, count in tally[f"{what}_by_year"].items():
                    years[int(year)] = years.get(int(year), 0) + count
    documents = totals["documents"]
    largest = sorted(documents, key=lambda source: (-sum(documents[source].values()), source))
    for by_source in totals.values():
        for source in largest[MOST_DOMAINS:]:
            others = by_source.setdefault("other domains", {})
            for year, count in by_source.pop(source).items():
                others[year] = others.get(year, 0) + count
    every = sorted({year for years in totals["documents"].values() for year in years})
    if not every:
        return ""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "data card", "svg.fonttype": "none"}):
        figure, both = pyplot.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
        for axes, (what, by_source) in zip(both, totals.items(), strict=True):
            sources = sorted(by_source)
            heights = [[by_source[source].get(year, 0) for year in every] for source in sources]
            axes.stackplot(every, heights, labels=sources, step="mid")
            told = "runs of rows" if what == "documents" and is_tape(card) else what
            year = "year in which a run's last row was released" if is_tape(card) else "year of release"
            axes.set(xlabel=year, ylabel=f"{told} a year")
            axes.spines[["top", "right"]].set_visible(False)
        both[0].legend(frameon=False, fontsize=8, loc="upper left")
        image = io.StringIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return image.getvalue()[image.getvalue().index("<svg") :]

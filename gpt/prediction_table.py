"""The table that gpt.predict prints: two lines an entity, the model's forecast and EWMA's."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from gpt.cli import print_titled, wide_console

NARROW = 100  # characters in a line, below which only these quantiles are shown
OUTER = ("2.5", "50", "97.5")


def print_predictions(result: dict[str, Any]) -> None:
    days, forecasts = result["horizon"], result["forecasts"]
    row = "day" if all(entry["rows"] == "daily" for entry in forecasts) else "row"
    what = f"Change on the next {row}" if days == 1 else f"Sum of the changes on the next {days} {row}s"
    how = "exact" if days == 1 else f"{result['samples']:,} paths, seed {result['seed']}"
    title = f"{what} by {result['checkpoint']}, {how}"
    compact: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(**compact)
    table.add_column("entity; after → " + ("day" if days == 1 else "last day"), min_width=14)
    table.add_column("by", no_wrap=True)
    console = wide_console()
    shown = tuple(forecasts[0]["model"]["quantiles"]) if console.width >= NARROW else OUTER
    for column in (*(f"{level}%" for level in shown), "mean", "sd", "P(gain)"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in forecasts:
        unit, scale = ("%", 100) if entry["change"] == "log-return" else ("units", 1)
        when = f"{entry['as_of']} → {entry['last_day']}, {unit}"
        size = scale * entry["ewma"]["standard_deviation"]
        digits = min(4, max(0, 2 - math.floor(math.log10(size))))
        for name, by, method in ((escape(entry["entity"]), "model", "model"), (when, "EWMA", "ewma")):
            says = entry[method]
            quantiles = (says["quantiles"][level] for level in shown)
            numbers = (*quantiles, says["mean"], says["standard_deviation"])
            gain = f"{100 * says['probability_of_gain']:.1f}%"
            table.add_row(name, by, *(f"{scale * number:.{digits}f}" for number in numbers), gain)
        table.add_section()
    print_titled(title, table, console)
    if shown is OUTER:
        console.print("This terminal is too narrow for the other quantiles; --json has them all.")
    for sentence in notes(result):
        console.print(sentence, markup=False, highlight=False)


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be known to read the numbers."""
    forecasts, until = result["forecasts"], result["trained_on_rows_until"]
    last = max(entry["released"] for entry in forecasts)
    said = [
        "Log-returns in %, or differences in the entity's own units; columns with % are quantiles. "
        f"P(gain) is no signal: {result['direction_note']}; EWMA's is 50% by construction.",
        f"Nothing released after the row of 'after' was used as context, the last of which was on {last}; "
        f"the model learned from rows up to {until}. "
        "Days ahead are weekdays on which the entity has rows, a month or a quarter ahead where its rows are "
        "so far apart; holidays are not known.",
    ]
    early = [entry["entity"] for entry in forecasts if entry["released"] < until]
    if early:
        said.append(f"The model has learned from rows after these: {', '.join(early)}.")
    if result["left_out"]:
        said.append(f"Left out, without train rows or without any so early: {', '.join(result['left_out'])}.")
    return said

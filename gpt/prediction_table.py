"""The table that gpt.predict prints: two lines an entity, the model's forecast and EWMA's."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from gpt.cli import wide_console

WIDE = 1.05  # variance_of_bins from which on a reader is told


def print_predictions(result: dict[str, Any]) -> None:
    days = result["horizon"]
    what = "Change on the next day" if days == 1 else f"Sum of the changes on the next {days} days"
    how = "exact" if days == 1 else f"{result['samples']:,} paths, seed {result['seed']}"
    table = Table(title=f"{what} by {result['checkpoint']}, {how}", title_justify="left")
    forecasts = result["forecasts"]
    for column in ("entity", "after", "day" if days == 1 else "to", "in", "by"):
        table.add_column(column, no_wrap=column != "entity")
    for column in (*(f"{level}%" for level in forecasts[0]["model"]["quantiles"]), "mean", "sd", "P(gain)"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in forecasts:
        log_return = entry["change"] == "log-return"
        scale, unit = (100, "%") if log_return else (1, "units")
        head = (entry["entity"], entry["as_of"], entry["last_day"], unit, "model")
        for cells, method in ((head, "model"), (("", "", "", "", "EWMA"), "ewma")):
            says = entry[method]
            numbers = (*says["quantiles"].values(), says["mean"], says["standard_deviation"])
            gain = f"{100 * says['probability_of_gain']:.1f}%"
            table.add_row(*cells, *(f"{scale * number:.2f}" for number in numbers), gain)
        table.add_section()
    console = wide_console()
    console.print(table)
    for sentence in notes(result):
        console.print(sentence)


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be known to read the numbers."""
    forecasts, until = result["forecasts"], result["trained_on_rows_until"]
    said = [
        "Log-returns in %, or differences in the entity's own units; columns with % are quantiles. "
        f"P(gain) is no signal: {result['direction_note']}; EWMA's is 50% by construction.",
        f"Nothing after the day in 'after' was used as context; the model learned from rows up to {until}. "
        "Days ahead are weekdays on which the entity has rows; holidays are not known.",
    ]
    early = [entry["entity"] for entry in forecasts if entry["released"] < until]
    if early:
        said.append(f"The model has learned from rows after these: {', '.join(early)}.")
    if result["variance_of_bins"] > WIDE:
        excess = 100 * (result["variance_of_bins"] - 1)
        said.append(
            f"The tape's outermost bins are so wide that the variance of train comes out {excess:.0f}% too "
            "large: so do sd here, and sums over several days; inner quantiles of a day are not affected."
        )
    if result["left_out"]:
        said.append(f"Left out, without train rows or without any so early: {', '.join(result['left_out'])}.")
    return said

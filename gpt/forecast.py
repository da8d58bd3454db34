"""Evaluation of a GPT on a tape of numbers; gpt.evaluate comes here for data prepared with --view numbers.

Every row of the split is forecast from the rows before it, those of earlier splits included. Scores are means
over rows with intervals of 95% from a circular block bootstrap over days (blocks of BLOCK_DAYS, all entities
of a day together, as their returns move together).

| score | of |
|---|---|
| NLL | the bin that came, in nats; the same bins for all methods |
| CRPS | twice the mean pinball loss over 99 quantiles, in standard deviations of the entity's train changes |
| coverage | the share of changes inside the central 50, 80 and 95% interval |
| direction | of changes other than 0: up is forecast where P(change > 0) > P(change < 0), else down |

Of the bin that 0 lies in, both sides get the shares that its train rows have there, a change of 0 being on
neither. About chance is what to expect of the direction; a model that calls one way only has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.table import Table

from data.bins import BINS
from data.documents import SPLITS
from data.numbers import Ids, Tape
from gpt.baselines import BASELINES, LEVELS, TRAIN, Forecasts, from_probabilities, in_train, train_deviations
from gpt.cli import UserError, print_titled, wide_console
from gpt.model import GPT
from tapelm import Tokenizer

BLOCK_DAYS = 20
REPLICATES = 1000
INTERVALS = (50, 80, 95)
CHANCE = "direction is about chance in published work; read it with its interval, never as a headline"


def score_tape(
    model: GPT, tokenizer: Tokenizer, tape: Tape, split: str, batch_size: int = 16
) -> dict[str, Any]:
    """Scores of the model and the baselines by domain and in total. Raises UserError for an empty split.

    Entities without train rows are left out and named: neither the baselines nor the model know them.
    """
    rows = np.flatnonzero(tape.rows["split"] == SPLITS.index(split))
    if not rows.size:
        raise UserError(f"the {split} split of the tape has no rows")
    known = in_train(tape)[tape.rows["entity"][rows]]
    left_out = [tape.entities[entity][0] for entity in np.unique(tape.rows["entity"][rows[~known]])]
    rows = rows[known]
    if not rows.size:
        raise UserError(
            f"no entity of the {split} split has train rows: prepare the tape with a later --validation-from"
        )
    methods = {
        "model": from_probabilities(tape, rows, bin_probabilities(model, tokenizer, tape, rows, batch_size))
    }
    methods |= {name: baseline(tape, rows) for name, baseline in BASELINES.items()}
    scores = {name: row_scores(tape, rows, forecasts) for name, forecasts in methods.items()}
    domains = np.array([tape.entities[entity][1] for entity in tape.rows["entity"][rows]])
    parts = {domain: domains == domain for domain in np.unique(domains).tolist()}
    days = tape.rows["day"][rows]
    return {
        "split": split,
        "rows": int(rows.size),
        "left_out_without_train_rows": left_out,
        "bootstrap": {"block_days": BLOCK_DAYS, "replicates": REPLICATES, "level": 0.95},
        "direction_note": CHANCE,
        "domains": {name: summary(scores, days, part) for name, part in parts.items()},
        "total": summary(scores, days, np.ones(rows.size, dtype=bool)),
    }


@torch.no_grad()
def bin_probabilities(
    model: GPT, tokenizer: Tokenizer, tape: Tape, rows: np.ndarray, batch_size: int
) -> np.ndarray:
    """(n, BINS) probabilities of the next bin at each of `rows`, given that it is a bin."""
    if 2 * tape.context + 2 > model.config.block_size:
        raise UserError(
            f"the tape's documents have {2 * tape.context + 2} tokens, the model's block is "
            f"{model.config.block_size}: prepare the tape with that --min-block"
        )
    ids = Ids.of(tape, tokenizer)
    place = np.full(tape.rows.size, -1)
    place[rows] = np.arange(rows.size)
    probabilities = np.empty((rows.size, BINS))
    by_length: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for context, wanted in _windows(tape, rows):
        by_length.setdefault(context.size, []).append((context, wanted))
    for windows in by_length.values():
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            tokens = np.stack([ids.document(tape, context)[:-1] for context, _ in batch]).astype(np.int64)
            logits = model.logits(torch.from_numpy(tokens).to(model.head.weight.device))
            bins = logits[:, 1::2, ids.first_bin : ids.first_bin + BINS]  # at the calendar tokens
            chances = torch.softmax(bins.double(), dim=-1).cpu().numpy()
            for (context, wanted), of_window in zip(batch, chances, strict=True):
                probabilities[place[wanted]] = of_window[np.searchsorted(context, wanted)]
    return probabilities


def _windows(tape: Tape, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(context, wanted): row numbers of one series; the wanted ones are its last, half a context at most."""
    stride = max(1, tape.context // 2)
    for series in np.unique(tape.rows["series"][rows]):
        first = int(np.flatnonzero(tape.rows["series"] == series)[0])
        of_series = rows[tape.rows["series"][rows] == series]
        for start in range(int(of_series[0]), int(of_series[-1]) + 1, stride):
            wanted = of_series[(of_series >= start) & (of_series < start + stride)]
            if wanted.size:
                end = int(wanted[-1]) + 1
                yield np.arange(max(first, end - tape.context), end), wanted


def row_scores(tape: Tape, rows: np.ndarray, forecasts: Forecasts) -> dict[str, np.ndarray]:
    """Scores (n,) by name; "up" is the direction called, 1 or -1, "rose" what came, 0 without a change."""
    change = tape.rows["change"][rows]
    scale = train_deviations(tape)[tape.rows["entity"][rows]]
    chosen = forecasts.probabilities[np.arange(rows.size), tape.rows["bin"][rows]]
    error = change[:, None] - forecasts.quantiles
    pinball = np.maximum(LEVELS * error, (LEVELS - 1) * error).mean(axis=1)
    scores = {"nll": -np.log(np.maximum(chosen, 1e-12)), "crps": 2 * pinball / scale}
    for interval in INTERVALS:
        low, high = (np.interp(level, LEVELS, np.arange(LEVELS.size)) for level in _ends(interval))
        inside = (change >= _quantile(forecasts, low)) & (change <= _quantile(forecasts, high))
        scores[f"coverage_{interval}"] = inside.astype(np.float64)
    rises, falls = sides(tape)
    scores["up"] = np.where(forecasts.probabilities @ (rises - falls) > 0, 1.0, -1.0)
    scores["rose"] = np.sign(change)
    return scores


def sides(tape: Tape) -> tuple[np.ndarray, np.ndarray]:
    """Two (BINS,): the share of each bin above 0 and that below; of the bin with 0, those of train's rows."""
    with_zero = int(tape.bins.encode(np.zeros(1))[0])
    inside = tape.rows["change"][(tape.rows["split"] == TRAIN) & (tape.rows["bin"] == with_zero)]
    rises, falls = ((np.arange(BINS) > with_zero).astype(float), (np.arange(BINS) < with_zero).astype(float))
    rises[with_zero], falls[with_zero] = (
        np.sum(outside) / max(1, inside.size) for outside in (inside > 0, inside < 0)
    )
    return rises, falls


def _ends(interval: int) -> tuple[float, float]:
    return (1 - interval / 100) / 2, (1 + interval / 100) / 2


def _quantile(forecasts: Forecasts, position: float) -> np.ndarray:
    """Quantiles (n,) at a fractional position among LEVELS."""
    low, share = int(position), position - int(position)
    high = min(low + 1, LEVELS.size - 1)
    return (1 - share) * forecasts.quantiles[:, low] + share * forecasts.quantiles[:, high]


def summary(scores: dict[str, dict[str, np.ndarray]], days: np.ndarray, part: np.ndarray) -> dict[str, Any]:
    """Means with intervals of the rows in `part`: every score as [value, low, high]."""
    sums: dict[str, np.ndarray] = {"rows": np.ones(int(part.sum()))}
    for name, columns in scores.items():
        for column in ("nll", "crps", *(f"coverage_{interval}" for interval in INTERVALS)):
            sums[f"{name}/{column}"] = columns[column][part]
    up, rose = scores["model"]["up"][part], scores["model"]["rose"][part]
    for name, found in (("tp", (up > 0) & (rose > 0)), ("tn", (up < 0) & (rose < 0)),
                        ("fp", (up > 0) & (rose < 0)), ("fn", (up < 0) & (rose > 0))):  # fmt: skip
        sums[name] = found.astype(np.float64)
    replicated = bootstrap(sums, days[part])

    def interval(compute: Any) -> list[float]:
        values = compute(replicated)
        low, high = np.quantile(values[1:], (0.025, 0.975))
        return [float(values[0]), float(low), float(high)]

    made: dict[str, Any] = {"rows": int(part.sum()), "days": int(np.unique(days[part]).size), "methods": {}}
    for name, columns in scores.items():
        made["methods"][name] = {
            column: interval(lambda of, key=f"{name}/{column}": of[key] / of["rows"])
            for column in columns
            if f"{name}/{column}" in sums
        }
        if name != "model":
            made["methods"][name]["model_nll_difference"] = interval(
                lambda of, key=f"{name}/nll": (of["model/nll"] - of[key]) / of["rows"]
            )
            made["methods"][name]["model_crps_ratio"] = interval(
                lambda of, key=f"{name}/crps": of["model/crps"] / of[key]
            )
    made["direction"] = {
        "accuracy": interval(lambda of: (of["tp"] + of["tn"]) / np.maximum(_decided(of), 1)),
        "mcc": interval(matthews),
        "share_called_up": float(np.mean(up > 0)),
        "share_up": float(np.sum(rose > 0) / max(1, np.sum(rose != 0))),
    }
    return made


def _decided(of: dict[str, np.ndarray]) -> np.ndarray:
    return of["tp"] + of["tn"] + of["fp"] + of["fn"]


def matthews(of: dict[str, np.ndarray]) -> np.ndarray:
    """Matthews' correlation coefficient from counts tp, tn, fp, fn; 0 where it is not defined."""
    tp, tn, fp, fn = (of[name] for name in ("tp", "tn", "fp", "fn"))
    below = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.where(below > 0, (tp * tn - fp * fn) / np.where(below > 0, below, 1), 0.0)


def bootstrap(columns: dict[str, np.ndarray], days: np.ndarray) -> dict[str, np.ndarray]:
    """Sums (1 + REPLICATES,) of each column: of all rows first, then of days drawn in circular blocks."""
    unique, where = np.unique(days, return_inverse=True)
    daily = np.stack(
        [np.bincount(where, weights=column, minlength=unique.size) for column in columns.values()]
    )
    doubled = np.concatenate((daily, daily), axis=1)
    running = np.concatenate((np.zeros((len(daily), 1)), np.cumsum(doubled, axis=1)), axis=1)
    length = min(BLOCK_DAYS, unique.size)
    generator = np.random.default_rng(0)
    starts = generator.integers(0, unique.size, (REPLICATES, -(-unique.size // length)))
    drawn = (running[:, starts + length] - running[:, starts]).sum(axis=2)
    sums = np.concatenate((daily.sum(axis=1, keepdims=True), drawn), axis=1)
    return dict(zip(columns, sums, strict=True))


def print_tape_table(result: dict[str, Any]) -> None:
    """One row for every domain and method, each value with half the width of its interval."""
    table = Table()
    for column in (
        "domain",
        "method",
        "NLL",
        "CRPS",
        *(f"{interval}%" for interval in INTERVALS),
        "model's NLL",
        "model's CRPS",
    ):
        table.add_column(column, justify="left" if column in ("domain", "method") else "right")
    for domain, part in (*result["domains"].items(), ("total", result["total"])):
        for name, scores in part["methods"].items():
            cells = [_cell(scores[key], 3) for key in ("nll", "crps")]
            cells += [_cell([100 * value for value in scores[f"coverage_{i}"]], 1) for i in INTERVALS]
            if name != "model":
                cells += [_cell(scores["model_nll_difference"], 3, sign="+")]
                cells += ["×" + _cell(scores["model_crps_ratio"], 3)]
            table.add_row(domain, name, *cells)
        table.add_section()
    print_titled(f"{result['split']} of {result['checkpoint']}, 95% intervals", table)
    if result["left_out_without_train_rows"]:
        names = ", ".join(result["left_out_without_train_rows"])
        wide_console().print(f"Left out, having no train rows: {names}.")
    wide_console().print(f"{direction_line(result)} Note: {CHANCE}.")


def direction_line(result: dict[str, Any]) -> str:
    """What the model's directions are worth, in a sentence; no percentage where it calls but one."""
    direction = result["total"]["direction"]
    called, rose = direction["share_called_up"], direction["share_up"]
    if called in (0, 1):
        way = "up" if called else "down"
        return f"Direction: {way} is called in every row: none is forecast; {rose:.1%} of changes rise."
    accuracy = _cell([100 * value for value in direction["accuracy"]], 1)
    return (
        f"Direction: {accuracy}% of changes other than 0 are called right, MCC {_cell(direction['mcc'], 3)}; "
        f"up is called in {called:.1%} of rows and comes in {rose:.1%} of changes."
    )


def _cell(score: list[float], digits: int, sign: str = "-") -> str:
    value, low, high = score
    return f"{value:{sign}.{digits}f} ±{(high - low) / 2:.{digits}f}"

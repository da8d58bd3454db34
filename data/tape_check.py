"""The leak check of a tape of numbers, which trusts nothing but the levels in its rows."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from data.bins import DECAY, SMALLEST_VOLATILITY, Bins, log_returns
from data.documents import SPLITS, DataError, SplitDates
from data.numbers import NO_SPLIT, ROWS, TAPE, Tape


def check_tape(directory: Path, dates: SplitDates) -> dict[str, Any]:
    """What was checked: days inside their splits, bins those of train, volatility trailing.

    Raises DataError naming what is wrong.
    """
    tape = Tape.load(directory)
    if np.any(tape.rows["released"] < tape.rows["day"]):
        raise DataError(f"leak: {directory / ROWS}: rows are released before their day")
    for split in SPLITS:
        rows = tape.rows[tape.rows["split"] == SPLITS.index(split)]
        for released in np.unique(rows["released"]):
            day = date.fromordinal(int(released))
            if dates.split_of(day) != split:
                raise DataError(f"leak: {directory / ROWS}: rows released {day} are in the {split} split")
    scaled = tape.rows["change"] / tape.rows["volatility"]
    fitted = Bins.fit(scaled[tape.rows["split"] == SPLITS.index("train")])
    if not np.array_equal(fitted.edges, tape.bins.edges):
        raise DataError(f"leak: {directory / TAPE}: the bins are not those of the train rows")
    if not np.array_equal(tape.bins.encode(scaled), tape.rows["bin"]):
        raise DataError(f"leak: {directory / ROWS}: the tokens are not the bins of change over volatility")
    for number in np.unique(tape.rows["series"]):
        _check_series(directory, tape, tape.rows[tape.rows["series"] == number])
    return {"rows": int(tape.rows.size), "bins_fitted_on_train": True, "embargo_rows": tape.context}


def _check_series(directory: Path, tape: Tape, rows: np.ndarray) -> None:
    """Raise DataError unless changes are those of the levels, volatility trails and the embargo is kept."""
    name = tape.entities[rows["entity"][0]][0]
    difference = tape.differences[rows["entity"][0]]
    changes = log_returns(rows["level"], differences=difference)[1:]
    before = rows["volatility"][:-1]
    expected = np.sqrt(DECAY * before**2 + (1 - DECAY) * rows["change"][:-1] ** 2)
    told = before > SMALLEST_VOLATILITY  # below it the average behind it is not known
    trails = np.isclose(rows["volatility"][1:], np.maximum(expected, SMALLEST_VOLATILITY), rtol=1e-9)
    if not np.allclose(changes, rows["change"][1:], rtol=1e-9, atol=1e-12) or not np.all(trails | ~told):
        raise DataError(f"leak: {directory / ROWS}: the volatility of {name} is not that of the rows before")
    for split, after in ((0, 1), (1, 2)):
        last, first = np.flatnonzero(rows["split"] == split), np.flatnonzero(rows["split"] >= after)
        first = first[rows["split"][first] != NO_SPLIT]
        if last.size and first.size and first[first > last[0]].size:
            gap = first[first > last[0]][0] - last[-1] - 1
            if gap < tape.context:
                where = f"{directory / ROWS}: {name}"
                raise DataError(f"leak: {where}: {gap} rows between two splits, fewer than a context")

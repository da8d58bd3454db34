"""What a forecast of the next return has to beat. All are fitted on train rows and look back from there.

| name | next change is |
|---|---|
| unconditional | any change of the entity's train rows, each as likely |
| random walk | normal, with the standard deviation of the entity's train rows |
| EWMA | normal, with the trailing volatility that scales the tape (decay 0.94) |
| GARCH(1,1) | normal, with parameters fitted by the package arch on train and then only filtered |
| bins | in each bin as often as the train rows of all entities are: what the tape knows without a network |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from data.bins import BINS
from data.documents import SPLITS
from data.numbers import Tape
from gpt.cli import UserError

LEVELS = np.arange(1, 100) / 100  # of the quantiles a forecast is scored by
UNIFORM = 0.01  # share of a uniform in empirical probabilities, so that no bin is impossible
TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Forecasts:
    """Of n rows: quantiles of the change (n, LEVELS) and probabilities of the bins (n, BINS)."""

    quantiles: np.ndarray
    probabilities: np.ndarray


def from_probabilities(tape: Tape, rows: np.ndarray, probabilities: np.ndarray) -> Forecasts:
    """Forecasts from bin probabilities (n, BINS), changes being spread inside a bin as those of train are."""
    scaled = tape.bins.quantiles(probabilities, np.broadcast_to(LEVELS, (len(rows), LEVELS.size)))
    return Forecasts(scaled * tape.rows["volatility"][rows, None], probabilities)


def from_normal(tape: Tape, rows: np.ndarray, deviation: np.ndarray) -> Forecasts:
    """Forecasts that are normal with mean 0 and a standard deviation for each row (n,)."""
    normal = NormalDist()
    points = np.array([normal.inv_cdf(level) for level in LEVELS])
    ratio = tape.rows["volatility"][rows] / deviation
    inner = torch.from_numpy(tape.bins.edges[1:-1] * ratio[:, None])
    cumulative = torch.special.ndtr(inner).numpy()
    ends = np.zeros((len(rows), 1))
    return Forecasts(points * deviation[:, None], np.diff(np.hstack((ends, cumulative, ends + 1)), axis=1))


def unconditional(tape: Tape, rows: np.ndarray) -> Forecasts:
    quantiles = np.empty((len(rows), LEVELS.size))
    probabilities = np.empty((len(rows), BINS))
    for entity in np.unique(tape.rows["entity"][rows]):
        known = np.sort(_train_changes(tape, entity))
        of_entity = tape.rows["entity"][rows] == entity
        quantiles[of_entity] = np.quantile(known, LEVELS)
        edges = tape.bins.edges[1:-1] * tape.rows["volatility"][rows[of_entity], None]
        cumulative = np.searchsorted(known, edges) / known.size
        ends = np.zeros((len(edges), 1))
        counted = np.diff(np.hstack((ends, cumulative, ends + 1)), axis=1)
        probabilities[of_entity] = (1 - UNIFORM) * counted + UNIFORM / BINS
    return Forecasts(quantiles, probabilities)


def random_walk(tape: Tape, rows: np.ndarray) -> Forecasts:
    return from_normal(tape, rows, train_deviations(tape)[tape.rows["entity"][rows]])


def ewma(tape: Tape, rows: np.ndarray) -> Forecasts:
    return from_normal(tape, rows, tape.rows["volatility"][rows])


def garch(tape: Tape, rows: np.ndarray) -> Forecasts:
    """Raises UserError where the package arch is missing."""
    try:
        arch_model: Any = import_module("arch").arch_model
    except ImportError as error:
        raise UserError("the GARCH baseline needs arch: pip install arch") from error
    scale = train_deviations(tape)
    deviation = np.zeros(tape.rows.size)
    for entity in np.unique(tape.rows["entity"][rows]):
        known = _train_changes(tape, entity) / scale[entity]
        fitted = arch_model(known, mean="Zero", vol="GARCH", p=1, q=1, rescale=False).fit(disp="off")
        omega, alpha, beta = (float(value) for value in fitted.params)
        for series in np.unique(tape.rows["series"][tape.rows["entity"] == entity]):
            of_series = tape.rows["series"] == series
            changes = tape.rows["change"][of_series] / scale[entity]
            variance, path = 1.0, np.empty(changes.size)
            for step, change in enumerate(changes):
                path[step] = variance
                variance = omega + alpha * change**2 + beta * variance
            deviation[of_series] = np.sqrt(path) * scale[entity]
    return from_normal(tape, rows, deviation[rows])


def train_bins(tape: Tape, rows: np.ndarray) -> Forecasts:
    """Filtered historical simulation: train's changes over trailing volatility, times that of the row."""
    counted = np.bincount(tape.rows["bin"][tape.rows["split"] == TRAIN], minlength=BINS)
    probabilities = (1 - UNIFORM) * counted / counted.sum() + UNIFORM / BINS
    return from_probabilities(tape, rows, np.tile(probabilities, (len(rows), 1)))


def train_deviations(tape: Tape) -> np.ndarray:
    """(entities,) root mean square of the train changes, NaN for an entity that is not in train."""
    known = in_train(tape)
    return np.array(
        [
            np.sqrt(np.mean(_train_changes(tape, entity) ** 2)) if known[entity] else np.nan
            for entity in range(len(tape.entities))
        ]
    )


def in_train(tape: Tape) -> np.ndarray:
    """(entities,) bool: whether train has two rows of the entity or more, to fit something to."""
    of_train = tape.rows["entity"][tape.rows["split"] == TRAIN]
    return np.bincount(of_train, minlength=len(tape.entities)) >= 2


def _train_changes(tape: Tape, entity: int) -> np.ndarray:
    return tape.rows["change"][(tape.rows["entity"] == entity) & (tape.rows["split"] == TRAIN)]


BASELINES: dict[str, Callable[[Tape, np.ndarray], Forecasts]] = {
    "unconditional": unconditional,
    "random walk": random_walk,
    "EWMA": ewma,
    "GARCH(1,1)": garch,
    "bins": train_bins,
}

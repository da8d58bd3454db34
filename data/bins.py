"""Returns into tokens and back: log-returns over trailing volatility, clipped, in 256 quantile bins.

A row's volatility comes from the rows before it alone. The bins are fitted on train and nothing else, which
`data.leaks` checks by fitting them again. A bin's middle is at most half a bin from every value in it.

Forecasts of bins become forecasts of changes by spreading each bin's probability as train's changes lie in
it. Evenly would not do: the outermost bins reach from about 2.8 to CLIP, most of what is in them is at their
inner end, and the variance of train would come out up to 17% too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data.documents import DataError

BINS = 256
PIECES = 32  # of a bin, between which its train changes lie in equal shares
CLIP = 8.0  # standard deviations; what is beyond counts as this
DECAY = 0.94  # RiskMetrics' weight of the past for daily returns
HISTORY = 20  # returns before the first that is told
SMALLEST_VOLATILITY = 1e-4  # of a day: below it stand pegged currencies, whose unit would be noise


def log_returns(levels: Sequence[float] | np.ndarray, *, differences: bool = False) -> np.ndarray:
    """(rows,) changes from the row before, the first 0; differences: of the levels themselves."""
    values = np.asarray(levels, dtype=np.float64)
    steps = np.diff(values if differences else np.log(values))
    return np.concatenate((np.zeros(min(1, values.size)), steps))


def trailing_volatility(returns: np.ndarray) -> np.ndarray:
    """(rows,) exponentially weighted standard deviation of the returns before each row.

    NaN for the first row and the HISTORY after it, whose returns start the average.
    """
    volatility = np.full(returns.size, np.nan)
    if returns.size <= HISTORY + 1:
        return volatility
    variance = np.array(np.mean(returns[1 : HISTORY + 1] ** 2))
    for row in range(HISTORY + 1, returns.size):
        volatility[row] = volatility_of(variance)
        variance = next_variance(variance, returns[row])
    return volatility


def next_variance(variance: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """The exponentially weighted variance (...,) once each of `returns` (...,) has come."""
    return DECAY * variance + (1 - DECAY) * returns**2


def volatility_of(variance: np.ndarray) -> np.ndarray:
    """What returns are told in units of: the root of `variance` (...,), but SMALLEST_VOLATILITY at least."""
    return np.maximum(np.sqrt(variance), SMALLEST_VOLATILITY)


def variance_after(returns: np.ndarray, volatility: np.ndarray) -> float:
    """The exponentially weighted variance behind the last of consecutive rows, at least one, of a series.

    returns, volatility (rows,): what trailing_volatility was given and made. At SMALLEST_VOLATILITY the
    variance itself is not known: it is followed from the last row above it, and where all are there, from
    the most that it can be in the first.
    """
    above = np.flatnonzero(volatility > SMALLEST_VOLATILITY)
    start = int(above[-1]) if above.size else 0
    variance = volatility[start] ** 2
    for change in returns[start:]:
        variance = next_variance(variance, change)
    return float(variance)


@dataclass(frozen=True)
class Bins:
    """Edges (BINS + 1,), strictly rising from -CLIP to CLIP, and how changes are spread between them.

    spread: (BINS * PIECES + 1,), not falling. Every PIECES-th is an edge; between two edges stand quantiles
    of the train changes in that bin, and even steps in a bin without any.
    """

    edges: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, scaled: np.ndarray) -> Bins:
        """Edges between which equal shares of `scaled` (rows,), those of train, lie, as far as ties allow.

        Raises DataError for fewer values than bins.
        """
        if scaled.size < BINS:
            raise DataError(
                f"{BINS} bins need as many train rows, there are {scaled.size}: give more or longer series"
            )
        inner = np.quantile(np.clip(scaled, -CLIP, CLIP), np.linspace(0, 1, BINS + 1)[1:-1])
        inner = np.round(inner, 9)  # no bin is so narrow that its middle is one of its edges
        edges = np.unique(np.concatenate(([-CLIP], inner, [CLIP])))
        while edges.size < BINS + 1:  # ties: many values are the same, as 0 for a day without a change
            widest = int(np.argmax(np.diff(edges)))
            edges = np.insert(edges, widest + 1, (edges[widest] + edges[widest + 1]) / 2)
        return cls.between(edges, scaled)

    @classmethod
    def between(cls, edges: np.ndarray, scaled: np.ndarray) -> Bins:
        """The bins of known edges (BINS + 1,), spread as `scaled` (rows,), those of train, lie in them."""
        spread = np.interp(np.arange(BINS * PIECES + 1) / PIECES, np.arange(BINS + 1), edges)
        values = np.sort(np.clip(scaled, -CLIP, CLIP))
        starts = np.searchsorted(values, edges)
        starts[-1] = values.size
        inner = np.arange(1, PIECES) / PIECES
        for number, (start, end) in enumerate(pairwise(starts)):
            if end > start:
                first = number * PIECES + 1
                spread[first : first + PIECES - 1] = np.quantile(values[start:end], inner, method="hazen")
        return cls(edges, spread)

    def encode(self, scaled: np.ndarray) -> np.ndarray:
        """(rows,) uint8 bins of scaled returns (rows,)."""
        found = np.searchsorted(self.edges, np.clip(scaled, -CLIP, CLIP), side="right") - 1
        return np.minimum(found, BINS - 1).astype(np.uint8)

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """(rows,) middles of the bins: within half a bin of what was encoded, once clipped."""
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        return middles[bins]

    def quantiles(self, probabilities: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """(n, L) quantiles of scaled returns at `levels` (n, L), in 0 to 1, each row at its own.

        From bin probabilities (n, BINS), spread inside a bin as train is. At uniform random levels these are
        samples.
        """
        cumulative = np.concatenate((np.zeros((len(levels), 1)), np.cumsum(probabilities, axis=1)), axis=1)
        cumulative /= cumulative[:, -1:]
        places = [np.interp(at, row, np.arange(BINS + 1)) for at, row in zip(levels, cumulative, strict=True)]
        return np.interp(np.stack(places), np.arange(self.spread.size) / PIECES, self.spread)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Means (BINS,) of a scaled return in each bin, and of its square, spread as in quantiles()."""
        low, high = self.spread[:-1], self.spread[1:]
        means, squares = (low + high) / 2, (low**2 + low * high + high**2) / 3
        return means.reshape(BINS, PIECES).mean(axis=1), squares.reshape(BINS, PIECES).mean(axis=1)


def levels_from(first: float, scaled: np.ndarray, volatility: np.ndarray) -> np.ndarray:
    """(rows,) levels that follow `first` by log-returns scaled * volatility; inverse of log_returns."""
    return first * np.exp(np.cumsum(scaled * volatility))

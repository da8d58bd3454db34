"""The days after the last row of a tape of numbers, and paths through them sampled from a model.

A tape is continued by rows to come: their days and, of the first, the volatility are known beforehand, so
that gpt.forecast's functions forecast that one as they do any row. On a path, each day's change is sampled
from the model, moves the volatility as it does in the tape (decay 0.94), and is read by the model before the
next day. The first day has a full context; later ones between half a one and a full one, as rows have in the
evaluation, so that keys and values of the rows before are computed once.
"""

from __future__ import annotations

import math
from calendar import monthrange
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

import numpy as np
import torch
from torch import Tensor

from data.bins import BINS, next_variance, variance_after, volatility_of
from data.numbers import NO_SPLIT, Ids, Tape
from data.series import spacing_of
from gpt.model import GPT, KVCache
from gpt.ops import Ops
from tapelm import Tokenizer

YEAR = 250  # rows that tell on which weekdays an entity has any
MONTHS_APART = {"monthly": 1, "quarterly": 3}
RARE = 0.05  # share of a weekday that is an exception, as a Saturday on which a market was open once


@dataclass(frozen=True)
class Continued:
    """One entity's rows up to a day and, behind them, those to come.

    tape: of these rows alone. last: the row before the first to come. variance: of the first to come, whose
    volatility is its root, see data.bins.
    """

    tape: Tape
    last: int
    variance: float


def continued(tape: Tape, entity: int, horizon: int, as_of: date) -> Continued | None:
    """The newest series of `entity` and `horizon` days more; None where no row was released by `as_of`.

    Of the rows, a context is kept; all splits' are, and those that no split has.
    """
    known = (tape.rows["entity"] == entity) & (tape.rows["released"] <= as_of.toordinal())
    if not known.any():
        return None
    rows = tape.rows[known]
    rows = rows[rows["series"] == rows["series"][-1]]
    variance = variance_after(rows["change"], rows["volatility"])
    days = np.fromiter(_days_after(rows["day"]), dtype=np.int64, count=horizon)
    kept = rows[-tape.context :]
    coming = np.zeros(horizon, dtype=rows.dtype)
    coming["entity"], coming["series"], coming["split"] = entity, kept["series"][-1], NO_SPLIT
    coming["day"] = coming["released"] = days
    coming["volatility"][0] = volatility_of(np.array(variance))
    both = np.concatenate((kept, coming))
    return Continued(
        Tape(both, tape.entities, tape.bins, tape.context, tape.differences), kept.size - 1, variance
    )


def _days_after(days: np.ndarray) -> Iterator[int]:
    """Ordinals after the last of `days` (rows,) that fall on the weekdays of a year of rows before.

    Of a monthly or quarterly series: on the latest day of the month of a year of rows before.
    """
    spacing = spacing_of(days.tolist()).name
    if spacing in MONTHS_APART:
        yield from _months_after(days, MONTHS_APART[spacing])
    counts = np.bincount((days[-YEAR:] - 1) % 7, minlength=7)  # ordinal 1 was a Monday
    usual = counts >= RARE * counts.sum()
    day = int(days[-1])
    while True:
        day += 1
        if usual[(day - 1) % 7]:
            yield day


def _months_after(days: np.ndarray, apart: int) -> Iterator[int]:
    last = date.fromordinal(int(days[-1]))
    latest = max(date.fromordinal(int(day)).day for day in days[-12 // apart :])
    month = 12 * last.year + last.month - 1
    while True:
        month += apart
        year, number = month // 12, month % 12 + 1
        yield date(year, number, min(latest, monthrange(year, number)[1])).toordinal()


def sample_paths(
    model: GPT, tokenizer: Tokenizer, of: Continued, probabilities: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """(paths, days) changes of paths from `levels` (paths, days), uniform random numbers in 0 to 1.

    probabilities (BINS,): of the first day's bin.
    """
    tape, paths, days = of.tape, len(levels), levels.shape[1]
    reader = _Reader(model, tokenizer, of, paths, days)
    chances = np.tile(probabilities, (paths, 1))
    bins, changes = np.empty((paths, days), dtype=np.int64), np.empty((paths, days))
    variance = np.full(paths, of.variance)
    for day in range(days):
        if day:
            chances = reader.probabilities(bins[:, :day])
        scaled = tape.bins.quantiles(chances, levels[:, day : day + 1])[:, 0]
        bins[:, day] = tape.bins.encode(scaled)
        changes[:, day] = scaled * volatility_of(variance)
        variance = next_variance(variance, changes[:, day])
    return changes


class _Reader:
    """The model along paths of one entity, day after day; past rows are read once for all paths."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, of: Continued, paths: int, days: int) -> None:
        self.model, self.paths, self.days, self.context = model, paths, days, of.tape.context
        self.device = model.head.weight.device
        ids = Ids.of(of.tape, tokenizer)
        self.past = ids.document(of.tape, np.arange(of.last + 1)).astype(np.int64)
        self.calendar, self.first_bin = ids.calendar[of.last + 1 :], ids.first_bin
        self.cache, self.room = KVCache(0, 0), 0  # the days that the cached rows may still be followed by

    @torch.no_grad()
    def probabilities(self, bins: np.ndarray) -> np.ndarray:
        """(paths, BINS) of the next day, after days with `bins` (paths, days before it, at least one)."""
        day = bins.shape[1]
        anew = self.room == 0
        first = day - 1
        if anew:
            self.room = min(max(1, self.context // 2), self.days - day)
            rows = self.context - self.room  # before this day; the cache grows to a context
            first = max(0, day - rows)
            self.cache = self._cache_of_past(rows - (day - first), 2 * (day - first + self.room) + 1)
        self.room -= 1
        tokens = np.empty((self.paths, 2 * (day - first) + 1), dtype=np.int64)
        tokens[:, ::2] = self.calendar[first : day + 1]
        tokens[:, 1::2] = self.first_bin + bins[:, first:]
        unread = torch.from_numpy(tokens if anew else tokens[:, 1:]).to(self.device)
        logits = self.model.logits(unread, self.cache)[:, -1, self.first_bin : self.first_bin + BINS]
        return torch.softmax(logits.double(), dim=-1).cpu().numpy()

    def _cache_of_past(self, rows: int, most_tokens: int) -> KVCache:
        """Keys and values of the entity and its last `rows` past rows, and room for tokens of each path."""
        kept = np.concatenate((self.past[:1], self.past[max(1, self.past.size - 2 * rows) :]))
        past = KVCache(self.model.config.n_layer, kept.size)
        self.model.hidden(torch.from_numpy(kept)[None].to(self.device), past)
        return SharedCache(past, most_tokens)


class SharedCache(KVCache):
    """The tokens of each window behind tokens that all windows begin with, whose keys are kept once.

    In attend(), the queries of all windows meet the common keys in one matrix product for each head.
    """

    def __init__(self, common: KVCache, most_tokens: int) -> None:
        """common: of one window; most_tokens: behind it."""
        super().__init__(len(common.lengths), most_tokens)
        self.common = common

    def __len__(self) -> int:
        return len(self.common) + super().__len__()

    def attend(self, ops: Ops, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        common, (k, v) = self.common.kept(layer), self.append(layer, k, v)
        B, H, T, D = q.shape
        keys, values = common[0][0], common[1][0]  # (H, S, D)
        together = (q / math.sqrt(D)).transpose(0, 1).reshape(H, B * T, D)
        of_common = (together @ keys.transpose(1, 2)).view(H, B, T, -1).transpose(0, 1)
        own = q @ k.transpose(-2, -1) / math.sqrt(D)
        later = torch.ones(T, k.shape[-2], dtype=torch.bool, device=q.device).triu(k.shape[-2] - T + 1)
        scores = torch.cat((of_common, own.masked_fill(later, float("-inf"))), dim=-1)
        weights = torch.softmax(scores, dim=-1)
        on_common, on_own = weights.split((keys.shape[1], k.shape[-2]), dim=-1)
        attended = on_common.transpose(0, 1).reshape(H, B * T, -1) @ values
        return attended.view(H, B, T, D).transpose(0, 1) + on_own @ v

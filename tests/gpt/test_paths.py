"""Paths through the days to come: their first day, what the model reads on them, volatility and days."""

from __future__ import annotations

import dataclasses
import math
import random
from calendar import monthrange
from datetime import date, timedelta

import numpy as np
import pytest
import torch

from data.bins import (
    BINS,
    HISTORY,
    PIECES,
    SMALLEST_VOLATILITY,
    trailing_volatility,
    variance_after,
    volatility_of,
)
from data.documents import SplitDates
from data.numbers import Ids, Tape, make_tape, make_tokenizer
from data.problems import Problems
from data.series import Row
from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.ops import PLAIN
from gpt.paths import _days_after, _Reader, continued, sample_paths
from gpt.predict import LEVELS, first_day, forecast
from tapelm import Tokenizer

CUTS = SplitDates(date(2012, 1, 1), date(2013, 1, 1), date(2014, 1, 1), embargo_days=0)


@pytest.fixture(scope="module")
def tape() -> Tape:
    generator, level, table = random.Random(0), 100.0, []
    for offset in range(1800):
        day = date(2009, 1, 1) + timedelta(days=offset)
        if day.weekday() < 5:
            level *= math.exp(generator.gauss(0, 0.01))
            table += [("fx", Row(day, day, name, "rate", level, "yen to the euro")) for name in ("a", "walk")]
    return make_tape(table, CUTS, 32, Problems(strict=True))


@pytest.fixture(scope="module")
def tokenizer(tape: Tape) -> Tokenizer:
    return make_tokenizer(tape)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """Untrained, and far from uniform."""
    size = tokenizer.vocab_size
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=size, dropout=0.0)
    made = GPT(shape, PLAIN).initialize(0).eval()
    for name, parameter in made.named_parameters():
        # The untrained model says the same of all days; this one follows what it has read.
        parameter.data.mul_(
            20 if name.startswith(("positions", "tokens")) else 8 if parameter.ndim == 2 else 1
        )
    return made


def test_first_day_of_paths_is_the_exact_one(model: GPT, tape: Tape, tokenizer: Tokenizer) -> None:
    of = continued(tape, 1, 2, date.max)
    assert of is not None
    chances = first_day(model, tokenizer, tape, [of], 1)[0]
    levels = np.random.default_rng(0).random((4000, 2))
    changes = sample_paths(model, tokenizer, of, chances, levels)
    volatility = of.tape.rows["volatility"][of.last + 1]
    cumulative = np.concatenate(([0.0], np.cumsum(np.repeat(chances / PIECES, PIECES))))
    at = np.interp(np.sort(changes[:, 0]) / volatility, tape.bins.spread, cumulative)
    assert np.abs(at - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / math.sqrt(4000)  # Kolmogorov, 1%
    exact = forecast(model, tokenizer, tape, ["walk"])["forecasts"][0]["model"]
    for level, value in zip(LEVELS, exact["quantiles"].values(), strict=True):
        assert np.mean(changes[:, 0] <= value) == pytest.approx(level / 100, abs=0.03)


def test_paths_vary_as_train_does(model: GPT, tokenizer: Tokenizer, tape: Tape) -> None:
    """Of a model that says what train has: its days are not wider than they have been."""
    of = continued(tape, 1, 1, date.max)
    assert of is not None
    train = tape.rows[tape.rows["split"] == 0]
    often = np.bincount(train["bin"], minlength=BINS) / train.size
    levels = (np.arange(100_000)[:, None] + 0.5) / 100_000
    changes = sample_paths(model, tokenizer, of, often, levels)
    known = (train["change"] / train["volatility"]).std() * math.sqrt(of.variance)
    assert changes.std() == pytest.approx(known, rel=0.01)


@pytest.mark.parametrize("past", [40, 4])
def test_paths_are_read_as_the_rows_of_a_tape_are(
    model: GPT, tokenizer: Tokenizer, tape: Tape, past: int
) -> None:
    """With keys and values kept, past a whole context, after many rows and after few."""
    first = int(np.flatnonzero(tape.rows["entity"] == 1)[0])
    short = dataclasses.replace(tape, rows=tape.rows[first : first + past])
    days, paths = 25, 3
    of = continued(short, 1, days, date.max)
    assert of is not None
    bins = np.random.default_rng(1).integers(0, BINS, (paths, days))
    reader, ids = _Reader(model, tokenizer, of, paths, days), Ids.of(of.tape, tokenizer)
    sizes = []
    for day in range(1, days):
        found = reader.probabilities(bins[:, :day])
        sizes.append(len(reader.cache) // 2)  # rows, this day's among them
        for path in range(paths):
            rows = of.tape.rows.copy()
            rows["bin"][of.last + 1 :] = bins[path]
            last = of.last + 1 + day
            window = np.arange(last + 1 - sizes[-1], last + 1)
            tokens = ids.document(dataclasses.replace(of.tape, rows=rows), window)[:-1].astype(np.int64)
            with torch.no_grad():
                logits = model.logits(torch.from_numpy(tokens)[None])[0, -1]
            expected = torch.softmax(logits[ids.first_bin : ids.first_bin + BINS].double(), dim=-1).numpy()
            assert np.allclose(found[path], expected, atol=1e-6)
    assert max(sizes) == tape.context
    assert min(sizes) >= (tape.context // 2 if past > tape.context else min(past + 2, tape.context // 2))


def test_variance_goes_on_as_the_tape_has_it() -> None:
    generator = np.random.default_rng(0)
    changes = generator.standard_normal(300) * 0.01
    volatility = trailing_volatility(changes)
    for row in (HISTORY + 2, 40, 299):
        known = slice(HISTORY + 1, row)
        told = volatility_of(np.array(variance_after(changes[known], volatility[known])))
        assert told == pytest.approx(volatility[row], rel=1e-12)
    changes[100:] *= 1e-5  # the average stays known below the smallest volatility
    changes[280:] = 2e-4
    volatility = trailing_volatility(changes)
    assert volatility[250] == SMALLEST_VOLATILITY < volatility[299]
    for row in (250, 290, 299):
        known = slice(HISTORY + 1, row)
        told = volatility_of(np.array(variance_after(changes[known], volatility[known])))
        assert told == pytest.approx(volatility[row], rel=1e-9)
    assert variance_after(np.zeros(5), np.full(5, SMALLEST_VOLATILITY)) < SMALLEST_VOLATILITY**2


def test_days_to_come_are_weekdays_that_the_entity_has() -> None:
    start = date(2020, 1, 1).toordinal()
    every = np.arange(start, start + 400)
    work = every[(every - 1) % 7 < 5]
    friday = work[: np.flatnonzero((work - 1) % 7 == 4)[-1] + 1]
    following = _days_after(friday)
    assert [next(following) - friday[-1] for _ in range(6)] == [3, 4, 5, 6, 7, 10]
    once = np.sort(np.append(friday, friday[-1] - 20 - (friday[-21] - 1) % 7 - 1))  # one day of a weekend
    assert next(_days_after(once)) - once[-1] == 3
    assert next(_days_after(every)) - every[-1] == 1
    assert next(_days_after(every[::7])) - every[::7][-1] == 7


@pytest.mark.parametrize(
    ("day", "apart", "coming"),
    [
        (1, 1, ["2021-01-01", "2021-02-01", "2021-03-01"]),
        (31, 1, ["2021-01-31", "2021-02-28", "2021-03-31"]),
        (12, 1, ["2021-01-14", "2021-02-14", "2021-03-14"]),  # on the 10th to the 14th: not before the last
        (31, 3, ["2021-03-31", "2021-06-30", "2021-09-30"]),
    ],
)
def test_days_to_come_of_sparse_rows_are_a_month_or_a_quarter_ahead(
    day: int, apart: int, coming: list[str]
) -> None:
    months = [(2015 + month // 12, month % 12 + 1) for month in range(71, -1, -apart)][::-1]
    days = [
        date(*month, min(day, monthrange(*month)[1]) + (number % 5 - 2 if day == 12 else 0)).toordinal()
        for number, month in enumerate(months)
    ]
    following = _days_after(np.array(days))
    assert [date.fromordinal(next(following)).isoformat() for _ in range(3)] == coming


def test_volatility_moves_on_a_path_as_in_the_tape(model: GPT, tokenizer: Tokenizer, tape: Tape) -> None:
    """A model without an opinion has the same bins each day, so that changes tell their volatilities."""
    even = GPT(model.config, PLAIN).eval()
    even.load_state_dict(model.state_dict())
    even.head.weight.data.zero_()
    of = continued(tape, 1, 12, date.max)
    assert of is not None
    levels = np.random.default_rng(3).random((5, 12))
    changes = sample_paths(even, tokenizer, of, np.full(BINS, 1 / BINS), levels)
    scaled = np.interp(levels, np.linspace(0, 1, tape.bins.spread.size), tape.bins.spread)
    variance = of.tape.rows["volatility"][of.last] ** 2
    before = of.tape.rows["change"][of.last]
    for day in range(12):
        variance = 0.94 * variance + 0.06 * before**2
        assert np.allclose(changes[:, day], scaled[:, day] * np.sqrt(variance), rtol=1e-9)
        before = changes[:, day]

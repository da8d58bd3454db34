"""Forecasts of numbers: scores in closed form, honest baselines, calibrated intervals, and the program."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from data.bins import BINS, Bins
from data.documents import SplitDates
from data.numbers import Ids, Tape, make_tape, make_tokenizer
from data.prepare import Config, prepare
from data.problems import Problems
from data.series import Row
from gpt import baselines
from gpt.baselines import BASELINES, from_normal, from_probabilities, train_deviations
from gpt.cli import UserError
from gpt.config import ModelConfig, preset
from gpt.evaluate import check_same_tape, main
from gpt.forecast import (
    _windows,
    bin_probabilities,
    bootstrap,
    direction_line,
    matthews,
    print_tape_table,
    row_scores,
    score_tape,
    summary,
)
from gpt.model import GPT
from gpt.ops import PLAIN
from gpt.train import train

DATES = SplitDates(date(2012, 1, 1), date(2013, 1, 1), date(2014, 1, 1), embargo_days=0)
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}


def rows(entity: str, seed: int, *, normal: bool = False) -> list[tuple[str, Row]]:
    generator, level, table = random.Random(seed), 100.0, []
    for offset in range(1800):
        day = date(2009, 1, 1) + timedelta(days=offset)
        if day.weekday() < 5:
            size = 0.01 if normal or offset // 150 % 2 else 0.02
            level *= math.exp(generator.gauss(0, size))
            table.append(("fx", Row(day, day, entity, "rate", level, "yen to the euro")))
    return table


@pytest.fixture(scope="module")
def tape() -> Tape:
    table = [row for seed, name in enumerate(("a", "b", "c")) for row in rows(name, seed)]
    return make_tape(table, DATES, 32, Problems(strict=True))


def of_split(tape: Tape, code: int) -> np.ndarray:
    return np.flatnonzero(tape.rows["split"] == code)


def test_normal_forecasts_have_the_scores_of_the_normal(tape: Tape) -> None:
    """CRPS of N(0, s) at y: s (z (2F(z) - 1) + 2f(z) - 1/sqrt(pi)), z = y / s."""
    chosen = of_split(tape, 1)
    deviation = tape.rows["volatility"][chosen]
    forecasts = from_normal(tape, chosen, deviation)
    assert np.allclose(forecasts.probabilities.sum(axis=1), 1)
    scores = row_scores(tape, chosen, forecasts)
    z = tape.rows["change"][chosen] / deviation
    cdf = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z])
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    exact = deviation * (z * (2 * cdf - 1) + 2 * density - 1 / math.sqrt(math.pi))
    scale = train_deviations(tape)[tape.rows["entity"][chosen]]
    assert np.mean(scores["crps"]) == pytest.approx(np.mean(exact / scale), rel=0.02)
    inside = np.abs(z) <= 0.6744898
    assert np.mean(scores["coverage_50"] == inside) > 0.999
    edges = tape.bins.edges * np.array([[1.0]])
    low, high = edges[0, tape.rows["bin"][chosen]], edges[0, tape.rows["bin"][chosen] + 1]
    mass = [
        0.5 * (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))
        for a, b in zip(low, high, strict=True)
    ]
    inner = (tape.rows["bin"][chosen] > 0) & (tape.rows["bin"][chosen] < BINS - 1)
    assert np.allclose(scores["nll"][inner], -np.log(mass)[inner], rtol=1e-6)


def test_bin_probabilities_become_quantiles(tape: Tape) -> None:
    chosen = of_split(tape, 1)[:5]
    probabilities = np.zeros((5, BINS))
    probabilities[:, 100] = probabilities[:, 101] = 0.5
    forecasts = from_probabilities(tape, chosen, probabilities)
    volatility = tape.rows["volatility"][chosen]
    assert np.allclose(forecasts.quantiles[:, 49], tape.bins.edges[101] * volatility)
    train = tape.rows[tape.rows["split"] == 0]
    inside = (train["change"] / train["volatility"])[train["bin"] == 100]
    assert np.allclose(forecasts.quantiles[:, 24], np.median(inside) * volatility)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_look_at_nothing_later(tape: Tape, name: str) -> None:
    pytest.importorskip("arch")
    chosen = of_split(tape, 1)
    cut = chosen[len(chosen) // 2]
    spoiled = Tape(tape.rows.copy(), tape.entities, tape.bins, tape.context, tape.differences)
    later = (tape.rows["day"] >= tape.rows["day"][cut]) & (tape.rows["split"] != 0)
    spoiled.rows["change"][later] *= 5
    earlier = chosen[tape.rows["day"][chosen] <= tape.rows["day"][cut]]
    before, after = BASELINES[name](tape, earlier), BASELINES[name](spoiled, earlier)
    assert np.array_equal(before.quantiles, after.quantiles)
    assert np.array_equal(before.probabilities, after.probabilities)
    assert np.all(np.diff(before.quantiles, axis=1) >= 0) and before.probabilities.min() >= 0
    assert np.allclose(before.probabilities.sum(axis=1), 1)


def test_garch_follows_the_volatility_of_the_next_days(tape: Tape) -> None:
    pytest.importorskip("arch")
    chosen = of_split(tape, 1)
    scores = {name: row_scores(tape, chosen, BASELINES[name](tape, chosen)) for name in BASELINES}
    crps = {name: scores[name]["crps"].mean() for name in BASELINES}
    assert crps["GARCH(1,1)"] < crps["random walk"] and crps["EWMA"] < crps["random walk"]


def test_bins_are_as_often_as_in_train_times_volatility(tape: Tape) -> None:
    chosen = of_split(tape, 1)
    forecasts = baselines.train_bins(tape, chosen)
    train = tape.rows[tape.rows["split"] == 0]
    counted = np.array([np.sum(train["bin"] == number) for number in range(BINS)]) / train.size
    assert np.allclose(forecasts.probabilities, 0.99 * counted + 0.01 / BINS)
    known = np.quantile(train["change"] / train["volatility"], baselines.LEVELS)
    volatility = tape.rows["volatility"][chosen, None]
    assert np.allclose(forecasts.quantiles / volatility, known, atol=0.05)


def test_garch_without_arch(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(baselines, "import_module", missing)
    with pytest.raises(UserError, match="pip install arch"):
        baselines.garch(tape, of_split(tape, 1))


def test_intervals_of_a_right_model_cover_what_they_say() -> None:
    table = [row for seed in range(6) for row in rows(f"e{seed}", seed, normal=True)]
    tape = make_tape(table, DATES, 32, Problems(strict=True))
    chosen = of_split(tape, 1)
    scores = {"model": row_scores(tape, chosen, from_normal(tape, chosen, np.full(chosen.size, 0.01)))}
    made = summary(scores, tape.rows["day"][chosen], np.ones(chosen.size, dtype=bool))
    for interval in (50, 80, 95):
        value, low, high = made["methods"]["model"][f"coverage_{interval}"]
        assert low < value < high and low - 0.02 < interval / 100 < high + 0.02
    accuracy, mcc = made["direction"]["accuracy"], made["direction"]["mcc"]
    assert accuracy[1] <= accuracy[0] <= accuracy[2] and mcc[1] <= mcc[0] <= mcc[2]


def test_bootstrap_covers_the_mean_and_keeps_days_together() -> None:
    generator = np.random.default_rng(1)
    days = np.repeat(np.arange(4000), 10)
    common = np.repeat(generator.standard_normal(4000), 10)
    sums = bootstrap({"rows": np.ones(40_000), "x": common}, days)
    means = sums["x"] / sums["rows"]
    assert means[0] == pytest.approx(common.mean())
    assert means[1:].std() == pytest.approx(1 / math.sqrt(4000), rel=0.15)  # not 1 / sqrt(40_000)
    # The same days are drawn each time; beside another column the sums may be rounded in another order.
    np.testing.assert_allclose(bootstrap({"x": common}, days)["x"], sums["x"], rtol=1e-9, atol=1e-9)


def test_a_bin_with_zero_is_split_as_train_has_it(tape: Tape) -> None:
    """With an edge at 0, a change of 0 falls into the bin above, whose probability is not one of a rise."""
    inner = np.linspace(-2, 2, BINS - 1)
    edges, zero = np.concatenate(([-8.0], inner, [8.0])), BINS // 2
    assert edges[zero] == 0
    scaled = np.full(tape.rows.size, 1.0)
    of_train = of_split(tape, 0)
    scaled[of_train[:400]] = 0.0
    scaled[of_train[400:500]] = edges[zero + 1] / 2
    table = tape.rows.copy()
    table["change"] = scaled * table["volatility"]
    bins = Bins.between(edges, scaled[of_train])
    table["bin"] = bins.encode(scaled)
    made = Tape(table, tape.entities, bins, tape.context, tape.differences)
    chosen = of_split(made, 1)[:3]
    probabilities = np.zeros((3, BINS))
    probabilities[:, zero] = 0.5  # a fifth of it above 0
    probabilities[:, 0], probabilities[:, -1] = (0.32, 0.29, 0.5), (0.18, 0.21, 0.0)
    scores = row_scores(made, chosen, from_probabilities(made, chosen, probabilities))
    assert scores["up"].tolist() == [-1, 1, -1]


def test_one_direction_is_told_without_a_percentage() -> None:
    rose = np.array([1.0, 1.0, -1.0, 0.0])
    others = {name: np.ones(4) for name in ("nll", "crps", "coverage_50", "coverage_80", "coverage_95")}
    told = []
    for up in (np.ones(4), np.array([1.0, -1.0, -1.0, 1.0])):
        part = summary({"model": others | {"up": up, "rose": rose}}, np.arange(4), np.ones(4, dtype=bool))
        told.append((part["direction"], direction_line({"total": part})))
    assert told[0][1] == "Direction: up is called in every row: none is forecast; 66.7% of changes rise."
    assert told[1][0]["accuracy"][0] == pytest.approx(2 / 3)  # the row without a change does not count
    assert told[1][0]["share_called_up"] == 0.5 and told[1][0]["share_up"] == pytest.approx(2 / 3)
    assert told[1][1].startswith("Direction: 66.7 ±") and "MCC 0.500" in told[1][1]


def test_matthews_coefficient() -> None:
    counts = {name: np.array([value]) for name, value in {"tp": 6, "tn": 3, "fp": 1, "fn": 2}.items()}
    assert matthews(counts)[0] == pytest.approx((6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5))
    assert matthews({name: np.array([0.0]) for name in counts})[0] == 0


def test_every_row_is_forecast_once_from_the_rows_before_it(tape: Tape) -> None:
    chosen = of_split(tape, 1)
    wanted = np.concatenate([wanted for _, wanted in _windows(tape, chosen)])
    assert np.array_equal(np.sort(wanted), chosen)
    for context, part in _windows(tape, chosen):
        assert np.array_equal(context[-part.size :], part) and context.size <= tape.context
        assert np.unique(tape.rows["series"][context]).size == 1
    tokenizer = make_tokenizer(tape)
    model = (
        GPT(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size, dropout=0.0), PLAIN).initialize(0).eval()
    )
    model.head.weight.data.mul_(30)
    found = bin_probabilities(model, tokenizer, tape, chosen, 8)
    assert np.allclose(found.sum(axis=1), 1)
    spoiled = Tape(tape.rows.copy(), tape.entities, tape.bins, tape.context, tape.differences)
    spoiled.rows["bin"][chosen[-1]] ^= 1  # the last row: only its own forecast could see it, and must not
    assert np.array_equal(found, bin_probabilities(model, tokenizer, spoiled, chosen, 8))
    ids = Ids.of(tape, tokenizer)
    assert ids.first_bin + BINS == tokenizer.vocab_size


def test_entities_without_train_rows_are_left_out_and_named(
    tape: Tape, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("arch")
    tokenizer = make_tokenizer(tape)
    model = (
        GPT(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size, dropout=0.0), PLAIN).initialize(0).eval()
    )
    late = (tape.rows["entity"] == 1) & (tape.rows["split"] == 0)
    shorter = Tape(tape.rows[~late], tape.entities, tape.bins, tape.context, tape.differences)
    result = score_tape(model, tokenizer, shorter, "val")
    assert result["left_out_without_train_rows"] == ["b"]
    assert result["rows"] == np.sum((tape.rows["split"] == 1) & (tape.rows["entity"] != 1))
    for scores in result["total"]["methods"].values():
        assert all(np.isfinite(values).all() for values in scores.values())
    print_tape_table(result | {"checkpoint": "run"})
    assert "Left out, having no train rows: b." in capsys.readouterr().out
    none = Tape(tape.rows[tape.rows["split"] != 0], tape.entities, tape.bins, tape.context, tape.differences)
    with pytest.raises(UserError, match="no entity of the val split has train rows"):
        score_tape(model, tokenizer, none, "val")


def test_mistakes(tape: Tape) -> None:
    tokenizer = make_tokenizer(tape)
    small = ModelConfig(
        n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=tokenizer.vocab_size, dropout=0.0
    )
    model = GPT(small, PLAIN).initialize(0).eval()
    with pytest.raises(UserError, match="documents have 32 tokens, the model's block is 16"):
        score_tape(model, tokenizer, tape, "val")
    empty = Tape(tape.rows[tape.rows["split"] == 0], tape.entities, tape.bins, tape.context, tape.differences)
    with pytest.raises(UserError, match="the test split of the tape has no rows"):
        score_tape(model, tokenizer, empty, "test")


def test_program_trains_and_evaluates_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("arch")
    lines = ["date,entity,value,unit"]
    for seed, name in enumerate(("a", "b")):
        lines += [f"{row.date},{name},{row.value!r},yen to the euro" for _, row in rows(name, seed)]
    (tmp_path / "rates.csv").write_text("\n".join(lines) + "\n")
    data, others = tmp_path / "data", tmp_path / "others"
    for out, shift in ((data, 0), (others, 60)):
        prepare(
            Config(
                out=out,
                source=("rows",),
                input=(str(tmp_path / "rates.csv"),),
                view="numbers",
                min_block=32,
                validation_from=DATES.validation_from - timedelta(days=shift),
                test_from=DATES.test_from,
                until=DATES.until,
            )
        )
    run = tmp_path / "run"
    shape = SHAPE | {"batch_size": 8}
    config = preset("demo", data=data, out=run, **shape, max_steps=30, learning_rate=3e-3, threads=1)
    train(config)
    file = run / "evaluation.json"
    assert main(["--checkpoint", str(run), "--data", str(data), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert list(result["domains"]) == ["rates"]
    methods = result["total"]["methods"]
    assert list(methods) == ["model", "unconditional", "random walk", "EWMA", "GARCH(1,1)", "bins"]
    for scores in methods.values():
        for value, low, high in scores.values():
            assert low <= value <= high
    difference = methods["model"]["nll"][0] - methods["bins"]["nll"][0]
    assert methods["bins"]["model_nll_difference"][0] == pytest.approx(difference)
    assert methods["model"]["nll"][0] < math.log(BINS) + 0.3
    said = capsys.readouterr().out
    assert "about chance" in said and "Direction: " in said
    summary_file = json.loads((run / "summary.json").read_text())
    assert summary_file["val_bits_per_byte"] > 0
    assert summary_file["text_sha256"] == result["text_sha256"]
    with pytest.raises(UserError, match=f"tape that {data} held, {others} has other rows, splits or bins"):
        main(["--checkpoint", str(run), "--data", str(others), "--json", str(file)])
    with pytest.raises(UserError, match="does not say which tape it was trained on: train again on"):
        check_same_tape(run, {}, data)
    with pytest.raises(UserError, match=r"cannot resume from .*: tape was .* and is .* now"):
        train(dataclasses.replace(config, data=others, resume="auto"))
    with pytest.raises(
        UserError, match="a tape in blocks of 32 tokens: pass --block-size 32, or prepare it with"
    ):
        train(dataclasses.replace(config, out=tmp_path / "another", block_size=64))

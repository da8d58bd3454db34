"""Forecasts of days to come: as the evaluation has them, from the last row, and by paths that are right."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data.bins import BINS, PIECES
from data.documents import SPLITS
from data.numbers import NO_SPLIT, Ids, Tape, make_tokenizer
from data.prepare import Config, prepare
from gpt import generate
from gpt.baselines import from_probabilities
from gpt.checkpoint import load_model
from gpt.cli import UserError
from gpt.config import ModelConfig, preset
from gpt.forecast import _windows, bin_probabilities, row_scores, sides
from gpt.model import GPT
from gpt.ops import PLAIN
from gpt.paths import continued
from gpt.predict import PredictConfig, first_day, forecast, main, open_tape
from gpt.prediction_table import print_predictions
from gpt.train import train
from tapelm import Tokenizer

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32}
CUTS = {"validation_from": date(2012, 1, 1), "test_from": date(2013, 1, 1), "until": date(2013, 10, 1)}
LAST = date(2013, 12, 5)  # a Thursday


def write_table(path: Path, names: tuple[str, ...] = ("saw", "walk"), last: date = LAST) -> Path:
    """A saw goes up a percent and down a percent in turn, a walk anywhere; both on weekdays."""
    lines = ["date,entity,value,unit"]
    for name in names:
        generator, level, turn = random.Random(name), 100.0, 1
        for offset in range((last - date(2008, 1, 1)).days + 1):
            day = date(2008, 1, 1) + timedelta(days=offset)
            if day.weekday() < 5:
                turn = -turn
                step = turn * 0.01 if name == "saw" else generator.gauss(0, 0.01)
                level *= math.exp(step)
                lines.append(f"{day},{name},{level!r},yen to the euro")
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(out: Path, table: Path, **changes: Any) -> Path:
    cuts: dict[str, Any] = CUTS | changes
    prepare(Config(out=out, source=("rows",), input=(str(table),), view="numbers", min_block=32, **cuts))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tape")
    return prepared(folder / "data", write_table(folder / "rates.csv"))


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    shape: dict[str, Any] = SHAPE | {"batch_size": 16, "precision": "fp32", "threads": 1}
    train(preset("demo", data=data, out=data.parent / "run", **shape, max_steps=500, learning_rate=3e-3))
    return data.parent / "run"


@pytest.fixture(scope="module")
def tape(data: Path) -> Tape:
    return Tape.load(data)


@pytest.fixture(scope="module")
def tokenizer(tape: Tape) -> Tokenizer:
    return make_tokenizer(tape)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    """Untrained, and far from uniform."""
    shape = ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size, dropout=0.0)
    made = GPT(shape, PLAIN).initialize(0).eval()
    made.head.weight.data.mul_(30)
    made.positions.weight.data.mul_(10)
    return made


def predicted(run: Path, data: Path, file: Path, *options: str) -> dict[str, dict[str, Any]]:
    assert main(["--checkpoint", str(run), "--data", str(data), "--json", str(file), *options]) == 0
    return {entry["entity"]: entry for entry in json.loads(file.read_text())["forecasts"]}


def test_a_saw_is_predicted_and_nothing_of_a_walk(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tape = Tape.load(data)
    last = tape.rows[tape.rows["entity"] == 0][-1]
    one = predicted(run, data, tmp_path / "one.json")
    saw, walk = one["saw"], one["walk"]
    assert (saw["as_of"], saw["first_day"], saw["last_day"]) == ("2013-12-05", "2013-12-06", "2013-12-06")
    assert last["split"] == NO_SPLIT and date.fromordinal(int(last["day"])) == LAST  # later than --until
    up = float(last["change"]) < 0
    assert saw["model"]["probability_of_gain"] == pytest.approx(float(up), abs=0.02)
    assert saw["model"]["quantiles"]["50"] == pytest.approx(0.01 if up else -0.01, abs=0.001)
    assert saw["model"]["mean"] == pytest.approx(0.01 if up else -0.01, abs=0.001)
    assert saw["ewma"]["standard_deviation"] == pytest.approx(0.01, abs=0.001)
    assert 0.25 < walk["model"]["probability_of_gain"] < 0.75
    ratio = walk["model"]["standard_deviation"] / walk["ewma"]["standard_deviation"]
    assert 0.7 < ratio < 1.4
    title, *table = capsys.readouterr().out.splitlines()
    assert title.startswith("Change on the next day by ") and title.endswith("step-00000500, exact")
    said = " ".join(" ".join(table).split())
    assert "direction is about chance" in said and "2013-12-05" in said

    ten = predicted(run, data, tmp_path / "ten.json", "--horizon", "10", "--samples", "400")
    assert ten["saw"]["last_day"] == "2013-12-19"
    assert ten["saw"]["model"]["quantiles"]["50"] == pytest.approx(0, abs=0.003)
    assert ten["saw"]["model"]["standard_deviation"] < 0.4 * ten["saw"]["ewma"]["standard_deviation"]
    ratio = ten["walk"]["model"]["standard_deviation"] / ten["walk"]["ewma"]["standard_deviation"]
    assert 0.7 < ratio < 1.4
    assert "Sum of the changes on the next 10 days" in " ".join(capsys.readouterr().out.split())


def test_a_day_is_what_the_evaluation_says_of_its_row(model: GPT, tokenizer: Tokenizer, tape: Tape) -> None:
    rows = np.flatnonzero(tape.rows["split"] == SPLITS.index("val"))
    evaluated = bin_probabilities(model, tokenizer, tape, rows, 16)
    forecasts = from_probabilities(tape, rows, evaluated)
    up = row_scores(tape, rows, forecasts)["up"]
    for _, wanted in list(_windows(tape, rows))[:-1:7]:
        row = wanted[-1]  # that of the window with the same context
        at, entity = int(np.searchsorted(rows, row)), int(tape.rows["entity"][row])
        before = date.fromordinal(int(tape.rows["day"][row - 1]))
        name = tape.entities[entity][0]
        made = forecast(model, tokenizer, tape, [name], as_of=before)["forecasts"][0]
        assert made["as_of"] == before.isoformat()
        assert made["first_day"] == date.fromordinal(int(tape.rows["day"][row])).isoformat()
        assert made["volatility"] == pytest.approx(tape.rows["volatility"][row], rel=1e-12)
        quantiles = made["model"]["quantiles"]
        for level in (10, 25, 50, 75, 90):
            assert quantiles[str(level)] == pytest.approx(forecasts.quantiles[at, level - 1], rel=1e-4)
        for level, low in (("2.5", 1), ("97.5", 96)):
            assert forecasts.quantiles[at, low] <= quantiles[level] <= forecasts.quantiles[at, low + 1]
        rises, falls = sides(tape)
        gain = made["model"]["probability_of_gain"]
        assert gain == pytest.approx(evaluated[at] @ rises, rel=1e-4)
        assert up[at] == (1 if gain > evaluated[at] @ falls else -1)


def test_mean_and_deviation_are_those_of_the_quantiles(model: GPT, tokenizer: Tokenizer, tape: Tape) -> None:
    made = forecast(model, tokenizer, tape, ["walk"])["forecasts"][0]
    of = continued(tape, 1, 1, date.max)
    assert of is not None
    levels = (np.arange(200_000)[None] + 0.5) / 200_000
    chances = first_day(model, tokenizer, tape, [of], 1)
    cumulative = np.concatenate(([0.0], np.cumsum(np.repeat(chances[0] / PIECES, PIECES))))
    spread = np.interp(levels[0], cumulative, tape.bins.spread) * made["volatility"]
    assert made["model"]["mean"] == pytest.approx(spread.mean(), abs=1e-6)
    assert made["model"]["standard_deviation"] == pytest.approx(spread.std(), rel=1e-4)
    assert tape.bins.moments()[0].shape == (BINS,)


@pytest.mark.parametrize("horizon", [1, 5])
def test_rows_after_the_day_change_nothing(
    model: GPT, tokenizer: Tokenizer, tape: Tape, horizon: int
) -> None:
    as_of = date(2013, 3, 6)
    spoiled = dataclasses.replace(tape, rows=tape.rows.copy())
    later = spoiled.rows["released"] > as_of.toordinal()
    for field, factor in (("change", -5), ("volatility", 3), ("level", 2)):
        spoiled.rows[field][later] *= factor
    spoiled.rows["bin"][later] ^= 255
    spoiled.rows["day"][later] += 3
    options: dict[str, Any] = {"horizon": horizon, "samples": 100, "as_of": as_of}
    before, after = (forecast(model, tokenizer, one, **options) for one in (tape, spoiled))
    assert before == after
    assert before["forecasts"][0]["as_of"] == "2013-03-06"
    late = forecast(model, tokenizer, tape, **{**options, "as_of": as_of + timedelta(days=1)})
    assert late["forecasts"][0]["model"] != before["forecasts"][0]["model"]


def test_paths_come_again_with_their_seed(model: GPT, tokenizer: Tokenizer, tape: Tape) -> None:
    options: dict[str, Any] = {"horizon": 3, "samples": 200, "seed": 7}
    both = forecast(model, tokenizer, tape, **options)
    assert both == forecast(model, tokenizer, tape, **options)
    alone = forecast(model, tokenizer, tape, ["walk"], **options)["forecasts"]
    assert alone == both["forecasts"][1:]
    other = forecast(model, tokenizer, tape, ["walk"], **{**options, "seed": 8})["forecasts"]
    assert other[0]["model"] != alone[0]["model"] and other[0]["ewma"] == alone[0]["ewma"]
    parts = forecast(model, tokenizer, tape, ["walk"], **options, batch_size=64)["forecasts"]
    close = 0.02 * alone[0]["model"]["standard_deviation"]
    assert list(parts[0]["model"]["quantiles"].values()) == pytest.approx(
        list(alone[0]["model"]["quantiles"].values()), abs=close
    )


def test_later_rows_are_forecast_from_and_another_tape_is_refused(
    run: Path, data: Path, tmp_path: Path
) -> None:
    newer = prepared(tmp_path / "newer", write_table(tmp_path / "rates.csv", last=date(2014, 1, 10)))
    made = predicted(run, newer, tmp_path / "p.json", "--entity", "saw")
    assert list(made) == ["saw"] and made["saw"]["as_of"] == "2014-01-10"
    assert made["saw"]["first_day"] == "2014-01-13"
    others = tmp_path / "others"
    prepared(others, tmp_path / "rates.csv", validation_from=date(2011, 11, 1))
    options = ["--checkpoint", str(run), "--data"]
    with pytest.raises(
        UserError, match=r"has other rows, splits or bins: use that one .*later rows are fine"
    ):
        main([*options, str(others)])
    named = prepared(tmp_path / "named", write_table(tmp_path / "rates.csv", ("saw", "stroll")))
    with pytest.raises(UserError, match="are different tokenizers: use the data the model was trained on"):
        main([*options, str(named)])
    _, checkpoint, state = load_model(run)
    gone = state | {"config": state["config"] | {"data": str(tmp_path / "gone")}}
    with pytest.raises(UserError, match="keep that one"):
        open_tape(newer, checkpoint, gone)
    assert open_tape(data, checkpoint, gone).rows.size == Tape.load(data).rows.size


def test_mistakes(run: Path, data: Path, tiny_data: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", str(run), "--data"]
    with pytest.raises(UserError, match=r"no entity 'Saw' among the 2 of the tape: did you mean 'saw'\?"):
        main([*options, str(data), "--entity", "walk", "Saw"])
    with pytest.raises(UserError, match="no entity 'SPX' among the 2 of the tape: it has no name like it"):
        main([*options, str(data), "--entity", "SPX"])
    with pytest.raises(UserError, match=r"saw: no train rows, .* or none released by 2008-01-02"):
        main([*options, str(data), "--entity", "saw", "--as-of", "2008-01-02"])
    with pytest.raises(UserError, match=r"holds no tape of numbers: use .*data, as in training"):
        main([*options, str(tiny_data)])
    with pytest.raises(UserError, match=r"does not exist: name one of python -m data.prepare"):
        main([*options, str(tmp_path / "none")])
    for option, value, message in (
        ("--horizon", "0", "--horizon must be at least 1, got 0"),
        ("--samples", "9", "--samples must be at least 100, got 9"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--seed", "-1", r"--seed must be in \[0, 2\*\*63\), got -1"),
    ):
        with pytest.raises(UserError, match=message):
            main([*options, str(data), option, value])
    assert PredictConfig(run, data).horizon == 1


def test_entities_that_cannot_be_forecast_are_left_out_and_named(
    model: GPT, tokenizer: Tokenizer, tape: Tape
) -> None:
    late = (tape.rows["entity"] == 1) & (tape.rows["split"] == 0)
    shorter = dataclasses.replace(tape, rows=tape.rows[~late])
    made = forecast(model, tokenizer, shorter)
    assert made["left_out"] == ["walk"] and [entry["entity"] for entry in made["forecasts"]] == ["saw"]
    with pytest.raises(UserError, match="walk: no train rows"):
        forecast(model, tokenizer, shorter, ["saw", "walk"])


def test_a_narrow_terminal_gets_fewer_quantiles_and_names_are_no_markup(
    model: GPT,
    tokenizer: Tokenizer,
    tape: Tape,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gpt.prediction_table.wide_console", lambda: Console(width=90))
    made = forecast(model, tokenizer, tape, ["walk"])
    made["forecasts"][0] |= {"entity": "walk [red]", "change": "difference"}
    print_predictions(made | {"checkpoint": "run", "trained_on_rows_until": "2014-01-01", "left_out": ["x"]})
    said = " ".join(capsys.readouterr().out.split())
    assert "walk [red]" in said and "2013-12-05 → 2013-12-06, units" in said
    assert " 97.5% " in said and " 75% " not in said and "too narrow" in said
    assert "learned from rows after these: walk [red]." in said and "so early: x." in said


def test_monthly_series_are_forecast_by_the_month(
    model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, lines = random.Random(0), ["date,available_at,entity,value"]
    for name in ("prices", "wages"):
        level = 100.0
        for month in range(60 * 12):
            first = date(1960 + month // 12, month % 12 + 1, 1)
            level *= math.exp(generator.gauss(0.002, 0.004))
            lines.append(f"{first},{first + timedelta(days=43)},{name},{level!r}")
    (tmp_path / "macro.csv").write_text("\n".join(lines) + "\n")
    cuts = {"validation_from": date(1998, 1, 1), "test_from": date(2008, 1, 1), "until": None}
    tape = Tape.load(prepared(tmp_path / "data", tmp_path / "macro.csv", **cuts))
    tokenizer = make_tokenizer(tape)
    # Their weekdays say nothing: all have the token of a Monday.
    told = {token for row in range(24) for token in Ids.of(tape, tokenizer).calendar[[row]].tolist()}
    words = {tokenizer.decode([token]) for token in told}
    assert len(words) == 12 and all(word.endswith(" mon|>") for word in words)
    options: dict[str, Any] = {"horizon": 3, "samples": 100}
    for entry in forecast(model, tokenizer, tape, **options)["forecasts"]:
        assert (entry["rows"], entry["as_of"]) == ("monthly", "2019-12-01")
        assert (entry["first_day"], entry["last_day"]) == ("2020-01-01", "2020-03-01")
    made = forecast(model, tokenizer, tape)
    print_predictions(made | {"checkpoint": "run", "trained_on_rows_until": "2014-01-01"})
    assert capsys.readouterr().out.startswith("Change on the next row by run, exact\n")


def test_text_and_numbers_have_programs_of_their_own(
    run: Path, data: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=f"python -m gpt.predict --checkpoint {run} --data {data}$"
    ) as refused:
        generate.main(["--checkpoint", str(run), "--prompt", "SPX"])
    assert "writes no text" in str(refused.value) and capsys.readouterr().out == ""
    of_text = tmp_path / "text"
    shape: dict[str, Any] = SHAPE | {"vocab_size": 300, "batch_size": 2, "max_steps": 1, "threads": 1}
    train(preset("demo", data=tiny_data, out=of_text, **shape))
    for where in (data, tiny_data):
        with pytest.raises(UserError, match=r"is a model of text, with which python -m gpt\.generate"):
            main(["--checkpoint", str(of_text), "--data", str(where)])

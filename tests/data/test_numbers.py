"""The tape of numbers: bins invert within half a bin, look at nothing later, and belong to train alone."""

import json
import math
import random
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bins import BINS, CLIP, HISTORY, PIECES, Bins, levels_from, log_returns, trailing_volatility
from data.documents import DataError, SplitDates
from data.numbers import ROWS, TAPE, Ids, Tape, documents, make_tape, make_tokenizer
from data.prepare import Config, prepare
from data.problems import Problems
from data.series import Row
from data.sources.rows import read_rows
from data.tape_check import check_tape
from tapelm import Tokenizer, TokenLoader

DATES = SplitDates(date(2012, 1, 1), date(2013, 1, 1), date(2014, 1, 1), embargo_days=0)
BLOCK = 32


def rows(entity="the euro in yen", seed=0, *, count=1300, unit="yen to the euro"):
    generator = random.Random(f"{entity}{seed}")
    level, table = 100.0, []
    for offset in range(2 * count):
        day = date(2009, 1, 1) + timedelta(days=offset)
        if day.weekday() < 5 and len(table) < count:
            level *= math.exp(generator.gauss(0, 0.01 if offset // 200 % 2 else 0.02))
            table.append(("fx", Row(day, day, entity, "rate", level, unit)))
    return table


def tape_of(table, problems=None):
    return make_tape(table, DATES, BLOCK, problems or Problems(strict=True))


SHAPES = st.tuples(
    st.integers(0, 2**32), st.integers(BINS, 3000), st.sampled_from([0.0, 1e-9, 0.01, 1.0, 30.0])
)


def scaled_returns(shape):
    """Heavy tails, and where the scale is small many ties."""
    seed, count, scale = shape
    generator = np.random.default_rng(seed)
    values = generator.standard_t(3, count) * scale
    return np.where(generator.random(count) < 0.1, 0.0, values)


@settings(max_examples=100, deadline=None)
@given(SHAPES, SHAPES)
def test_a_bin_inverts_within_half_a_bin(train, others):
    bins = Bins.fit(scaled_returns(train))
    assert bins.edges.shape == (BINS + 1,) and np.all(np.diff(bins.edges) > 0)
    assert (bins.edges[0], bins.edges[-1]) == (-CLIP, CLIP)
    for values in (scaled_returns(train), scaled_returns(others), bins.edges):
        codes = bins.encode(values)
        half = np.diff(bins.edges)[codes] / 2
        assert np.all(np.abs(np.clip(values, -CLIP, CLIP) - bins.decode(codes)) <= half * (1 + 1e-12) + 1e-15)
        assert np.array_equal(bins.encode(bins.decode(codes)), codes)


@pytest.mark.parametrize("count", [BINS, 1000, 5001])
def test_bins_hold_equal_shares_of_train(count):
    train = np.random.default_rng(count).standard_normal(count)
    counts = np.bincount(Bins.fit(train).encode(train), minlength=BINS)
    assert counts.max() - counts.min() <= 2


def test_ties_leave_as_many_bins_and_too_few_rows_are_refused():
    assert Bins.fit(np.zeros(1000)).edges.size == BINS + 1
    with pytest.raises(DataError, match="256 bins need as many train rows, there are 100"):
        Bins.fit(np.zeros(100))


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_changes_are_spread_inside_their_bin(shape):
    train = scaled_returns(shape)
    bins = Bins.fit(train)
    assert np.array_equal(bins.spread[::PIECES], bins.edges) and np.all(np.diff(bins.spread) >= 0)
    levels = np.linspace(0.001, 0.999, 499)[None]
    for code in {0, BINS - 1, *bins.encode(train[:20]).tolist()}:
        only = np.eye(BINS)[[code]]
        low, high = bins.edges[code], bins.edges[code + 1]
        found = bins.quantiles(only, levels)
        assert np.all(np.diff(found) >= 0) and np.all((low <= found) & (found <= high))


TAPES = {
    "normal": lambda generator, count: generator.standard_normal(count),
    "heavy tails": lambda generator, count: generator.standard_t(4, count),
    "tied": lambda generator, count: np.round(2 * generator.standard_normal(count)) / 2,
    "often 0": lambda generator, count: generator.standard_t(4, count) * (generator.random(count) < 0.5),
}


@pytest.mark.parametrize("count", [1000, 100_000])
@pytest.mark.parametrize("name", TAPES)
def test_variance_of_train_comes_out_of_its_bins(name, count):
    """Spread evenly, the outermost bins alone would make it up to 17% too large."""
    train = np.clip(TAPES[name](np.random.default_rng(count), count), -CLIP, CLIP)
    bins = Bins.fit(train)
    often = np.bincount(bins.encode(train), minlength=BINS) / count
    mean, square = (often @ moment for moment in bins.moments())
    assert mean == pytest.approx(train.mean(), abs=0.005 * train.std())
    assert square == pytest.approx(np.mean(train**2), rel=0.01)
    drawn = bins.quantiles(often[None], (np.arange(200_000)[None] + 0.5) / 200_000)
    assert (drawn.mean(), np.mean(drawn**2)) == pytest.approx((mean, square), rel=0.002, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(HISTORY + 2, 400))
def test_levels_come_back_from_exact_and_from_binned_returns(seed, count):
    generator = np.random.default_rng(seed)
    levels = 100 * np.exp(np.cumsum(generator.standard_t(4, count) * 0.01))
    changes = log_returns(levels)
    volatility = trailing_volatility(changes)
    start = HISTORY + 1
    scaled = changes[start:] / volatility[start:]
    back = levels_from(levels[start - 1], scaled, volatility[start:])
    assert np.allclose(back, levels[start:], rtol=1e-10)
    bins = Bins.fit(generator.standard_normal(5000))
    middles = bins.decode(bins.encode(scaled))
    back = levels_from(levels[start - 1], middles, volatility[start:])
    half = np.diff(bins.edges)[bins.encode(scaled)] / 2 * volatility[start:]
    half += np.maximum(np.abs(scaled) - CLIP, 0) * volatility[start:]
    assert np.all(np.abs(np.log(back / levels[start:])) <= np.cumsum(half) + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(60, 1200), st.integers(0, 99))
def test_nothing_later_changes_a_volatility_or_a_train_token(cut, seed):
    table = rows()
    generator = random.Random(seed)
    altered = table[:cut] + [
        (domain, row._replace(value=row.value * generator.uniform(0.8, 1.25))) for domain, row in table[cut:]
    ]
    before, after = tape_of(table), tape_of(altered)
    earlier = before.rows["day"] < table[cut][1].date.toordinal()
    assert np.array_equal(before.rows["volatility"][earlier], after.rows["volatility"][earlier])
    if table[cut][1].date >= DATES.validation_from:
        assert np.array_equal(before.bins.edges, after.bins.edges)
        assert np.array_equal(before.rows["bin"][earlier], after.rows["bin"][earlier])


def test_volatility_is_that_of_the_rows_before():
    changes = log_returns([row.value for _, row in rows()])
    volatility = trailing_volatility(changes)
    variance = np.mean(changes[1 : HISTORY + 1] ** 2)
    for row in range(HISTORY + 1, 100):
        assert volatility[row] == pytest.approx(math.sqrt(variance))
        variance = 0.94 * variance + 0.06 * changes[row] ** 2
    assert np.all(np.isnan(volatility[: HISTORY + 1]))


def test_documents_fill_blocks_and_keep_a_context_between_splits(tmp_path):
    table = [
        *rows(),
        *rows("Apple (AAPL)", unit="adjusted dollars"),
        *rows("the VIX", unit="volatility points"),
    ]
    problems = Problems(strict=True)
    tape = tape_of(table, problems)
    assert [entity for entity, _ in tape.entities] == ["Apple (AAPL)", "the VIX", "the euro in yen"]
    assert tape.differences == [False, True, False] and tape.context == 15
    for series in range(3):
        of_series = tape.rows[tape.rows["series"] == series]
        train, val, test = (np.flatnonzero(of_series["split"] == code) for code in range(3))
        assert val[0] - train[-1] == tape.context + 1 and test[0] - val[-1] == tape.context + 1
        assert date.fromordinal(int(of_series["day"][val[0]])) == date(2012, 1, 2)
    tokenizer = make_tokenizer(tape)
    ids = Ids.of(tape, tokenizer)
    (first, *_), count = documents(tape, "train"), 0
    tokens = ids.document(tape, first)
    assert tokens.size + 1 == BLOCK
    words = tokenizer.decode(tokens[:2])
    assert words == "<|Apple (AAPL)|><|feb mon|>"
    row = tape.rows[first[0]]
    assert date.fromordinal(int(row["day"])) == date(2009, 2, 16)
    assert tokens[2] - ids.first_bin == row["bin"] == tape.bins.encode(row["change"] / row["volatility"])
    for split, repeats in (("train", 4), ("val", 1), ("test", 1)):
        parts = np.concatenate(list(documents(tape, split)))
        found = np.bincount(parts, minlength=tape.rows.size)
        of_split = tape.rows["split"] == ("train", "val", "test").index(split)
        assert found[~of_split].max() == 0 and found.max() <= repeats
        if split != "train":
            assert found[of_split].min() == 1
        for series in range(
            3
        ):  # in train all but a few of a series' first rows stand in a document, the last too
            own = found[of_split & (tape.rows["series"] == series)]
            assert np.all(own[-(own.size // tape.context * tape.context) :] > 0)
        count += parts.size
    assert count > 0


def write_table(path, table):
    lines = ["date,entity,value,unit,source"]
    lines += [f"{row.date},{row.entity},{row.value!r},{row.unit},{domain}" for domain, row in table]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepared(tmp_path, table, **changes):
    path = write_table(tmp_path / "rates.csv", table)
    config = Config(
        out=tmp_path / "out", source=("rows",), input=(str(path),), view="numbers", min_block=BLOCK,
        validation_from=DATES.validation_from, test_from=DATES.test_from, until=DATES.until, **changes,
    )  # fmt: skip
    return prepare(config), config.out


def test_bad_rows_of_a_table_are_named_by_line(tmp_path):
    table = [*rows(), *rows("IBM shares", unit="dollars a share")]
    spoiled = [*table]
    for line, value in ((10, math.nan), (20, -5.0), (30, math.inf)):
        spoiled[line] = (table[line][0], table[line][1]._replace(value=value))
    for line in range(1700, 2600):
        spoiled[line] = (table[line][0], table[line][1]._replace(value=table[line][1].value / 2))
    del spoiled[600:610]
    spoiled.insert(50, spoiled[49])
    card, out = prepared(tmp_path, spoiled)
    path = tmp_path / "rates.csv"
    assert {kind: entry["first"] for kind, entry in card["bad_rows"].items()} == {
        "not a number": [f"{path}, line 12", f"{path}, line 32"],
        "not a positive price": [f"{path}, line 22"],
        "second value for a day": [f"{path}, line 52"],
        "missing days": [f"{path}, line 603"],
        "likely split": [f"{path}, line 1693"],
    }
    assert np.unique(Tape.load(out).rows["series"]).size == 4
    with pytest.raises(DataError, match="likely split; the series begins anew there"):
        prepared(tmp_path, spoiled, strict=True, force=True)


def test_a_table_without_days_or_columns(tmp_path):
    table = rows()
    table[5] = (table[5][0], table[5][1]._replace(entity=""))
    path = write_table(tmp_path / "rates.csv", table)
    path.write_text(path.read_text().replace("2009-01-01,", "1 January,", 1))
    problems = Problems()
    assert len(list(read_rows([path], problems))) == len(table) - 2
    assert problems.places == {
        "date is not ISO": [f"{path}, line 2"],
        "no date or entity": [f"{path}, line 7"],
    }
    (tmp_path / "rates.csv").write_text("day,entity,value\n2009-01-01,a,1\n")
    with pytest.raises(DataError, match=r"rates\.csv: no column 'date', but 'day' holds dates"):
        prepare(Config(out=tmp_path / "x", source=("rows",), input=(str(tmp_path / "rates.csv"),)))


def test_two_runs_give_the_same_bytes_and_the_loader_reads_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    table = [*rows(), *rows("the euro in won")]
    cards = [prepared(tmp_path / name, table) for name in ("a", "b")]
    assert cards[0][0]["outputs"] == cards[1][0]["outputs"]
    card, out = cards[0]
    assert card["leak_check"]["embargo_rows"] == 15 and set(card["splits"]["train"]) == {"fx"}
    told = np.unique(np.concatenate(list(documents(Tape.load(out), "train"))))
    assert (
        card["splits"]["train"]["fx"]["bytes"] == told.size
    )  # each once, in however many documents it stands
    loader = TokenLoader(out / "train", 4, BLOCK)
    batch = next(loader)
    entities = set(Ids.of(Tape.load(out), Tokenizer.load(out / "tokenizer.json")).entities.tolist())
    assert set(batch.inputs[:, 0].tolist()) <= entities  # every window is a document
    assert (batch.inputs[:, -1] == loader.end_of_text).all()


def edit_tape(out, **fields):
    path = out / TAPE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bins_fitted_on_validation_are_caught(tmp_path):
    _, out = prepared(tmp_path, [*rows(), *rows("the euro in won")])
    check_tape(out, DATES)
    tape = Tape.load(out)
    scaled = tape.rows["change"] / tape.rows["volatility"]
    peeked = Bins.fit(scaled[tape.rows["split"] <= 1])
    edit_tape(out, edges=peeked.edges.tolist())
    with pytest.raises(DataError, match=r"leak: .*the bins are not those of the train rows"):
        check_tape(out, DATES)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("split", slice(None), 0, "rows released .* are in the train split"),
        ("day", -1, 738_000, "rows are released before their day"),
        ("volatility", 500, 0.3, "is not that of the rows before"),
        ("change", 500, 0.05, "is not that of the rows before"),
        ("bin", 700, 3, "tokens are not the bins"),
    ],
)
def test_other_leaks_of_a_tape_are_caught(tmp_path, field, row, value, message):
    _, out = prepared(tmp_path, [*rows(), *rows("the euro in won")])
    tape = Tape.load(out)
    tape.rows[field][row] = value
    scaled = tape.rows["change"] / tape.rows["volatility"]
    if "tokens" not in message:
        refitted = Bins.fit(scaled[tape.rows["split"] == 0])
        tape.rows["bin"] = refitted.encode(scaled)
        tape = Tape(tape.rows, tape.entities, refitted, tape.context, tape.differences)
    tape.save(out)
    with pytest.raises(DataError, match=f"leak: .*{message}"):
        check_tape(out, DATES)


def test_an_embargo_shorter_than_a_context_is_caught(tmp_path):
    _, out = prepared(tmp_path, [*rows(), *rows("the euro in won")])
    tape = Tape.load(out)
    first = np.flatnonzero(tape.rows["split"] == 1)[0]
    tape.rows["split"][first - 3] = 0
    scaled = tape.rows["change"] / tape.rows["volatility"]
    bins = Bins.fit(scaled[tape.rows["split"] == 0])
    tape.rows["bin"] = bins.encode(scaled)
    Tape(tape.rows, tape.entities, bins, tape.context, tape.differences).save(out)
    with pytest.raises(DataError, match="2 rows between two splits, fewer than a context"):
        check_tape(out, DATES)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="even number of tokens"):
        make_tape(rows(), DATES, 33, Problems())
    for taken in ("endoftext", "jan mon"):
        with pytest.raises(DataError, match=f"cannot be called '{taken}'"):
            make_tokenizer(make_tape(rows(taken), DATES, BLOCK, Problems()))
    with pytest.raises(DataError, match="no entity has more than 21 rows without a gap"):
        make_tape(rows()[:20], DATES, BLOCK, Problems())
    with pytest.raises(DataError, match="holds no tape of numbers"):
        Tape.load(tmp_path)
    (tmp_path / ROWS).write_bytes(b"nothing")
    with pytest.raises(DataError, match="holds no tape of numbers"):
        Tape.load(tmp_path)

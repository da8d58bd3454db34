"""Rows that are no prices, and jumps that are no returns: counted, named, and never told."""

import math
from datetime import date, timedelta

import pytest

from data.documents import DataError
from data.problems import EXAMPLES, Problems
from data.series import Row
from data.soundness import sound_series

START = date(2010, 1, 4)


def rows(values, unit="dollars a share", entity="IBM shares"):
    days = (START + timedelta(days=offset) for offset in range(10_000))
    weekdays = (day for day in days if day.weekday() < 5)
    return [
        Row(day, day, entity, "close", value, unit, f"prices.csv, line {line}")
        for line, (day, value) in enumerate(zip(weekdays, values, strict=False), 2)
    ]


def lengths(rows, problems, **settings):
    return [len(series.rows) for series in sound_series(rows, problems, **settings)]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (math.nan, "not a number"),
        (math.inf, "not a number"),
        (-math.inf, "not a number"),
        (-3.0, "not a positive price"),
        (0.0, "not a positive price"),
    ],
)
def test_what_is_no_price_is_named_by_file_and_line(value, kind):
    table = rows([100.0, 101.0, value, 102.0])
    problems = Problems()
    assert lengths(table, problems) == [3]
    assert (problems.rows, problems.places) == ({kind: 1}, {kind: ["prices.csv, line 4"]})
    with pytest.raises(DataError, match=f"prices.csv, line 4: {kind}"):
        lengths(table, Problems(strict=True))


def test_a_zero_volume_and_a_negative_change_are_values():
    table = [row._replace(field="volume", value=0.0, unit="shares") for row in rows([1.0])] + rows([5.0])
    yields = rows([-0.1, -0.2, 0.0], unit="percent", entity="a yield")
    problems = Problems(strict=True)
    assert lengths(table + yields, problems) == [1, 3]


def test_the_first_of_two_values_for_a_day_stays():
    table = rows([100.0, 101.0])
    table.insert(1, table[0]._replace(value=99.0, place="prices.csv, line 9"))
    problems = Problems()
    (series,) = sound_series(table, problems)
    assert series.values == [100.0, 101.0]
    assert problems.places == {"second value for a day": ["prices.csv, line 9"]}


def test_a_revision_does_not_take_the_place_of_what_was_released_before_it():
    """Wherever it stands in the file: else every later row would count as released as late as it."""
    table = rows([100.0, 101.0, 102.0])
    table.insert(0, table[0]._replace(value=99.0, available_at=date(2018, 5, 5), place="prices.csv, line 9"))
    problems = Problems()
    (series,) = sound_series(table, problems)
    assert series.values == [100.0, 101.0, 102.0] and series.released == series.dates
    assert problems.places == {"second value for a day": ["prices.csv, line 9"]} and not problems.notes


def test_another_unit_begins_the_series_anew():
    """Of which the first may be below 0, where prices have no logarithm."""
    table = rows([-0.5, 0.0], unit="percent") + rows([0, 0, 5.0, 6.0], unit="points")[2:]
    problems = Problems()
    assert lengths(table, problems) == [2, 2]
    assert problems.places == {"another unit": ["prices.csv, line 4"]}


def test_a_row_released_before_its_day_is_left_out():
    table = rows([100.0, 101.0, 102.0])
    table[1] = table[1]._replace(available_at=date(2008, 1, 1))
    problems = Problems()
    assert lengths(table, problems) == [2]
    assert problems.places == {"released before its day": ["prices.csv, line 3"]}


def test_a_late_row_that_delays_those_behind_it_is_noted():
    table = rows([100.0, 101.0, 102.0])
    table[1] = table[1]._replace(available_at=date(2012, 1, 1))
    problems = Problems()
    (series,) = sound_series(table, problems)
    assert series.released[1:] == [date(2012, 1, 1)] * 2
    assert list(problems.notes.values()) == [(1, "prices.csv, line 3")]


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 7, 1 / 2, 1 / 10])
@pytest.mark.parametrize("drift", [0.95, 1.0, 1.05])
def test_a_split_begins_the_series_anew(ratio, drift):
    values = [100.0 + step % 3 for step in range(30)]
    values += [value * ratio * drift for value in values]
    problems = Problems()
    assert lengths(rows(values), problems) == [30, 30]
    assert problems.places == {"likely split": ["prices.csv, line 32"]}
    with pytest.raises(DataError, match="line 32: likely split; the series begins anew there"):
        lengths(rows(values), Problems(strict=True))
    assert lengths(rows(values, unit="index points"), Problems(strict=True)) == [60]


def test_known_splits_are_not_counted_and_known_crashes_are_kept():
    table = rows([100.0, 100.0, 50.0, 50.0])
    strict = Problems(strict=True)
    assert lengths(table, strict, splits={("IBM shares", table[2].date): True}) == [2, 2]
    assert lengths(table, strict, splits={("IBM shares", table[2].date): False}) == [4]


def test_missing_days_begin_the_series_anew():
    table = rows([100.0] * 60)
    table = table[:20] + table[24:40] + table[46:]
    problems = Problems()
    assert lengths(table, problems) == [36, 14]  # four holidays are bridged
    assert problems.places == {"missing days": ["prices.csv, line 48"]}


@pytest.mark.parametrize("step", [7, 30, 91])
def test_rows_a_week_a_month_or_a_quarter_apart_are_one_series_until_one_is_missing(step):
    start = date(1990, 1, 31)
    table = [
        row._replace(
            date=start + timedelta(days=step * number), available_at=start + timedelta(days=step * number)
        )
        for number, row in enumerate(rows([100.0] * 60))
    ]
    assert lengths(table, Problems(strict=True)) == [60]
    problems = Problems()
    assert lengths(table[:40] + table[41:], problems) == [40, 19]
    assert problems.rows == {"missing days": 1}


def test_a_card_keeps_the_first_places_of_a_kind():
    problems = Problems()
    assert problems.warnings() == []
    for line in range(20):
        problems.skip("not JSON", f"a.jsonl, line {line}")
    problems.skip("not UTF-8", "b.txt, line 1")
    problems.skip("not a number", "a.jsonl, line 9")
    entry = problems.entry()["bad_rows"]
    assert entry["not JSON"] == {"count": 20, "first": [f"a.jsonl, line {n}" for n in range(EXAMPLES)]}
    (warning,) = problems.warnings()
    assert "20 not JSON, 1 not UTF-8, 1 not a number" in warning and "a.jsonl, line 0: not JSON" in warning
    assert "iconv -t utf-8" in warning


def test_the_first_bad_row_is_that_of_the_first_line():
    """Series are read by name and checked after all rows are: later lines may be found first."""
    problems = Problems()
    for kind, line in (("bad", 90), ("bad", 62), ("worse", 61), ("worse", 7)):
        problems.skip(kind, f"a.csv, line {line}")
    (warning,) = problems.warnings()
    assert "the first: a.csv, line 7: worse" in warning
    assert problems.places["worse"] == ["a.csv, line 7", "a.csv, line 61"]

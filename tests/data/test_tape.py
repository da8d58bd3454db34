"""The tape: nothing later than a note may change it, and what it says must be so."""

import math
import random
import re
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import DataError
from data.problems import Problems
from data.series import Row, Series
from data.tape import write_notes, write_wrap

START = date(2013, 12, 2)


def daily_rows(
    entity="the euro in US dollars", unit="US dollars to the euro", *, days=480, seed=0, scale=1.0
):
    generator = random.Random(f"{entity}{seed}")
    rows, level = [], scale
    for offset in range(days):
        day = START + timedelta(days=offset)
        if day.weekday() < 5:
            level *= math.exp(generator.gauss(0, 0.01))
            rows.append(Row(day, day, entity, "rate", level, unit))
    return rows


def monthly_rows(months=60, lag=28):
    generator = random.Random(7)
    rows, level = [], 100.0
    for offset in range(months):
        day = date(1990 + offset // 12, offset % 12 + 1, 1)
        level *= 1 + generator.gauss(0.003, 0.004)
        rows.append(Row(day, day + timedelta(days=31 + lag), "prices", "index", level, "price index"))
    return rows


def notes(rows, rhythm):
    if rhythm == "wrap":
        return list(write_wrap(rows, Problems(), source="s", group="a few stocks"))
    return list(write_notes(rows, Problems(), source="s", rhythm=rhythm))


def rows_for(rhythm):
    if rhythm == "release":
        return monthly_rows()
    names = ["a", "b", "c", "d", "e"] if rhythm == "wrap" else ["a"]
    return [
        row for name in names for row in daily_rows(name, "adjusted dollars" if rhythm == "wrap" else "won")
    ]


@pytest.mark.parametrize("rhythm", ["week", "month", "release", "wrap"])
@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 10_000), seed=st.integers(0, 99), drop=st.booleans())
def test_nothing_later_than_a_note_changes_it(rhythm, cut, seed, drop):
    rows = rows_for(rhythm)
    # The rows right after a late note are the ones a window that reaches too far would touch.
    told = notes(rows, rhythm)
    day = told[-1 - cut % (len(told) // 3)].available_at
    generator = random.Random(seed)
    altered = [
        row if row.available_at <= day else row._replace(value=row.value * generator.uniform(0.2, 5))
        for row in rows
        if row.available_at <= day or not (drop and generator.random() < 0.5)
    ]
    before = [note for note in told if note.available_at <= day]
    after = [note for note in notes(altered, rhythm) if note.available_at <= day]
    assert before == after


@pytest.mark.parametrize("rhythm", ["week", "month", "release", "wrap"])
def test_notes_are_released_after_what_they_tell_and_have_a_sensible_size(rhythm):
    found = notes(rows_for(rhythm), rhythm)
    assert len(found) > 10
    for note in found:
        assert note.date is not None and note.available_at is not None
        assert note.date <= note.available_at
        assert 200 < len(note.text.encode()) < 1500
        assert not re.search(r"nan|inf\b|None|  ", note.text)
    assert found == notes(rows_for(rhythm), rhythm)


def test_a_week_is_told_on_friday_even_when_friday_is_a_holiday():
    rows = [row for row in daily_rows() if row.date != date(2014, 4, 18)]
    note = next(note for note in notes(rows, "week") if note.available_at == date(2014, 4, 18))
    assert note.date == date(2014, 4, 17)
    assert "Thursday" in note.text and "week to Friday 18 April 2014" in note.text


def test_numbers_in_a_weekly_note_are_right():
    rows = daily_rows(scale=1.2)
    note = next(note for note in notes(rows, "week") if note.available_at == date(2014, 12, 12))
    values = {row.date: row.value for row in rows}
    ordered = [row.value for row in rows if row.date <= date(2014, 12, 12)]
    assert f"{ordered[-1]:.4f} US dollars to the euro" in note.text
    week = values[date(2014, 12, 12)] / values[date(2014, 12, 5)] - 1
    twenty = ordered[-1] / ordered[-21] - 1
    for change in (week, twenty, ordered[-1] / ordered[-2] - 1):
        words = f"{abs(change) * 100:.1f} percent"
        assert words in note.text or words == "0.0 percent"
    moves = [now / then - 1 for then, now in zip(ordered[-21:-1], ordered[-20:], strict=True)]
    mean = sum(moves) / 20
    volatility = math.sqrt(sum((move - mean) ** 2 for move in moves) / 19 * 252) * 100
    assert f"{volatility:.1f} percent a year" in note.text
    year = [value for day, value in values.items() if date(2013, 12, 13) <= day <= date(2014, 12, 12)]
    place = 100 * (ordered[-1] - min(year)) / (max(year) - min(year))
    assert f"{min(year):.4f}" in note.text and f"{place:.0f} percent" in note.text


def test_numbers_in_a_monthly_figure_are_right():
    rows = monthly_rows()
    note = notes(rows, "release")[-1]
    values = [row.value for row in rows]
    assert note.available_at == rows[-1].available_at
    assert f"{values[-1]:,.2f} on the 1982-84 base" in note.text
    for months in (1, 3, 12):
        assert f"{abs(values[-1] / values[-1 - months] - 1) * 100:.1f} percent" in note.text
    assert f"{(values[-1] / values[-13] - 1) * 100:.2f} percent compares" in note.text


def test_numbers_in_a_ranking_are_those_of_seven_days():
    rows = rows_for("wrap")
    note = next(note for note in notes(rows, "wrap") if note.available_at == date(2014, 12, 12))
    values = {(row.entity, row.date): row.value for row in rows}
    for name in "abcde":
        change = values[name, date(2014, 12, 12)] / values[name, date(2014, 12, 5)] - 1
        assert f"{name} {100 * change:+.1f}%".replace("-0.0", "0.0") in note.text.replace("\u2212", "-")


def test_adjusted_prices_never_show_a_level():
    """Multiplying the whole past by a later split factor must leave the text as it is."""
    rows = daily_rows("Apple (AAPL)", "adjusted dollars", scale=100.0)
    split = [row._replace(value=row.value / 4) for row in rows]
    for rhythm in ("week", "month"):
        assert notes(rows, rhythm) == notes(split, rhythm)


def test_a_late_report_holds_back_what_follows():
    rows = monthly_rows()
    late = date(1994, 12, 30)
    rows[40] = rows[40]._replace(available_at=late)
    released = {note.date: note.available_at for note in notes(rows, "release")}
    assert released[rows[39].date] == rows[39].available_at
    assert all(released[row.date] >= late for row in rows[40:])


def test_two_values_for_a_day_are_refused():
    rows = daily_rows()
    with pytest.raises(DataError, match="two values"):
        Series([*rows, rows[5]])


@pytest.mark.parametrize("rhythm", ["week", "month", "release"])
def test_a_change_that_has_been_does_not_sound_like_one_to_come(rhythm):
    """Over twenty trading days "ahead 4.1 percent" would be read as a look into the future."""
    texts = [note.text for note in notes(rows_for(rhythm), rhythm)]
    assert any(" up by " in text for text in texts) and not any("ahead" in text for text in texts)

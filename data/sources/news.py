"""Finance news of S&P 500 companies from EODHD, as the original project fetched it.

The key is read from the environment variable EODHD_API_KEY. Pages of PAGE articles are kept in the cache as
they came, so that an interrupted run goes on where it stopped. Without --tickers the companies are today's
members of the index: a choice made with hindsight, which the data card says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus, Origin, cache_folder
from data.documents import END_OF_TEXT, DataError, Document, read_jsonl
from data.problems import Problems
from data.sources.columns import to_day
from data.sources.fetch import Fetcher

ADDRESS = "https://eodhd.com/api"
KEY = "EODHD_API_KEY"
PAGE = 1000  # articles in an answer, the most the service gives
INTERVAL = 0.06  # seconds; 1,000 requests a minute are allowed
HINDSIGHT = "; companies are today's members of the S&P 500, chosen with hindsight"


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """Fetch what the cache lacks. Raises DataError without a key or when the service refuses."""
    key = os.environ.get(KEY)
    if not key:
        raise DataError(f"--source news needs an EODHD API key in the environment variable {KEY}")
    folder = cache_folder(config.cache, "news")
    fetcher = Fetcher(INTERVAL)
    tickers = config.tickers or index_members(fetcher, folder, key)
    span = f"{config.since or 'first'}_{config.to or 'last'}"
    paths: list[Path] = []
    for ticker in progress.track(tickers, description="news"):
        paths += fetch_ticker(fetcher, folder / span / ticker, ticker, key, config)
    inputs = {str(path.relative_to(folder)): sha256_of(path) for path in paths}
    what = "news articles, EODHD" + ("" if config.tickers else HINDSIGHT)
    origins = {"news": Origin(what, "EODHD terms: own use, no redistribution")}
    return Corpus(lambda problems: read_pages(paths, problems), inputs, origins=origins)


def index_members(fetcher: Fetcher, folder: Path, key: str) -> tuple[str, ...]:
    """Today's members of the S&P 500, as the service lists them."""
    query = {"api_token": key, "fmt": "json", "filter": "Components"}
    content = fetcher.save(folder / "members.json", f"{ADDRESS}/fundamentals/GSPC.INDX", query)
    try:
        return tuple(sorted(str(entry["Code"]) for entry in json.loads(content).values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / 'members.json'} is no list of index members: remove it") from error


def fetch_ticker(fetcher: Fetcher, folder: Path, ticker: str, key: str, config: Config) -> list[Path]:
    """The pages of a ticker: read until one is not full. A full last page is followed by the next number."""
    paths: list[Path] = []
    symbol = ticker if "." in ticker else f"{ticker}.US"
    query = {"s": symbol, "limit": str(PAGE), "fmt": "json", "api_token": key}
    query |= {"from": str(config.since)} if config.since else {}
    query |= {"to": str(config.to)} if config.to else {}
    while True:
        path = folder / f"{len(paths):05}.json"
        content = fetcher.save(path, f"{ADDRESS}/news", query | {"offset": str(len(paths) * PAGE)})
        paths.append(path)
        if content.count(b'"title"') < PAGE:
            return paths


def read_pages(paths: Sequence[Path], problems: Problems) -> Iterator[Document]:
    """Articles: title and content, released on the day of their time stamp (UTC); each link once."""
    for path in paths:
        try:
            articles = json.loads(path.read_bytes())
        except ValueError:
            problems.skip("not JSON", str(path), "remove the file and fetch again")
            continue
        if not isinstance(articles, list):
            problems.skip("not a list of articles", str(path), "remove the file and fetch again")
            continue
        for number, article in enumerate(articles):
            document = _article(article, f"{path}, article {number}", problems)
            if document is not None:
                yield document


def _article(article: Any, place: str, problems: Problems) -> Document | None:
    match article:
        case {"date": str(stamp), "title": str(title), "content": str(content)} if content.strip():
            try:
                day = to_day(stamp)
            except ValueError:
                problems.skip("date is not ISO", place)
                return None
            text = f"{title.strip()}\n\n{content.strip()}".replace(END_OF_TEXT, " ")
            link = article.get("link")
            return Document(text, "news", day, day, link if isinstance(link, str) and link else None)
    problems.skip("no article", place)
    return None


def write_plain(train: Path, target: Path) -> None:
    """finance_corpus.txt: the cleaned news of the train split, an end-of-text mark after each article."""
    with open(target, "w", encoding="utf-8", newline="\n") as file:
        for document in read_jsonl(train):
            if document.source == "news":
                file.write(f"{document.text}\n{END_OF_TEXT}\n")

"""FOMC minutes and Beige Books from the Federal Reserve Board's site.

Minutes are released on the day the calendar names beside their link; where it names none, three weeks after
the meeting since December 2004 and, before that, two months after it: a little late rather than a day early.
A Beige Book is released on the day its page names, else counted at the end of its month.
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

from rich.progress import Progress

from data.card import sha256_of
from data.config import Config
from data.corpus import Corpus, Origin, cache_folder
from data.documents import END_OF_TEXT, DataError, Document
from data.problems import Problems
from data.sources.fetch import Fetcher, html_text
from data.words import MONTHS

ADDRESS = "https://www.federalreserve.gov"
INTERVAL = 0.5  # seconds
FIRST_YEAR = 1993
QUICKER_FROM = date(2004, 12, 14)  # the first meeting whose minutes came after three weeks
ORIGINS = {
    "fomc-minutes": Origin("minutes of the FOMC, Federal Reserve Board", "public domain"),
    "beige-book": Origin("Beige Book, Federal Reserve Board", "public domain"),
}
MINUTES = re.compile(r'href="([^"]*/(?:fomcminutes|minutes/(?:\d{4}/)?)(\d{8})(?:min)?\.htm)"')
BEIGE_BOOK = re.compile(r'href="([^"]*/beigebook(\d{4})(\d{2})(?:-summary)?\.htm)"')
RELEASED = re.compile(rf"Released\s+({'|'.join(MONTHS)})\s+(\d{{1,2}}),\s+(\d{{4}})")
DAY = re.compile(rf"({'|'.join(MONTHS)})\s+(\d{{1,2}}),\s+(\d{{4}})")


@dataclass(frozen=True, slots=True)
class Page:
    """A page in the cache; released: None where the page itself has to say it."""

    path: Path
    source: str
    day: date
    released: date | None


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """Fetch what the cache lacks, from --since to --to. Raises DataError when no page is found."""
    folder = cache_folder(config.cache, "fed")
    fetcher = Fetcher(INTERVAL, {"User-Agent": config.user_agent or "Mozilla/5.0 (compatible)"})
    last = (config.to or datetime.now().date()).year
    pages: dict[str, Page] = {}
    years = range(max(FIRST_YEAR, config.since.year if config.since else FIRST_YEAR), last + 1)
    for year in progress.track(years, description="Federal Reserve"):
        for page in (*minutes_of(fetcher, folder, year), *beige_books_of(fetcher, folder, year)):
            early = config.since is not None and page.day < config.since
            if not early and not (config.to is not None and page.day > config.to):
                pages[page.path.name] = page
    if not pages:
        raise DataError(f"no minutes and no Beige Book found at {ADDRESS} for {years[0]} to {years[-1]}")
    found = [pages[name] for name in sorted(pages)]
    inputs = {page.path.name: sha256_of(page.path) for page in found}
    return Corpus(lambda problems: read_pages(found, problems), inputs, origins=ORIGINS)


def minutes_of(fetcher: Fetcher, folder: Path, year: int) -> Iterator[Page]:
    """Minutes of a year's meetings. The last five years or so are on one calendar page."""
    recent = year > datetime.now().year - 6
    name = "fomccalendars.htm" if recent else f"fomchistorical{year}.htm"
    listing = _listing(fetcher, folder, name)
    for match in MINUTES.finditer(listing):
        day = datetime.strptime(match[2], "%Y%m%d").date()
        if day.year != year:
            continue
        path = folder / f"fomcminutes{match[2]}.htm"
        fetcher.save(path, _absolute(match[1]))
        said = RELEASED.search(re.sub(r"<[^>]*>", " ", listing[match.end() : match.end() + 300]))
        delay = timedelta(days=21 if day >= QUICKER_FROM else 60)
        yield Page(path, "fomc-minutes", day, _day(said) if said else day + delay)


def beige_books_of(fetcher: Fetcher, folder: Path, year: int) -> Iterator[Page]:
    """Beige Books of a year."""
    for match in BEIGE_BOOK.finditer(_listing(fetcher, folder, f"beigebook{year}.htm")):
        path = folder / f"beigebook{match[2]}{match[3]}.htm"
        fetcher.save(path, _absolute(match[1]))
        yield Page(path, "beige-book", date(int(match[2]), int(match[3]), 1), None)


def _listing(fetcher: Fetcher, folder: Path, name: str) -> str:
    """A page of links, fetched anew every time as it grows; empty where the site has none for that year."""
    try:
        return fetcher.get(f"{ADDRESS}/monetarypolicy/{name}").decode(errors="replace")
    except DataError as error:
        if "status 404" in str(error):
            return ""
        raise


def _absolute(link: str) -> str:
    return link if link.startswith("http") else f"{ADDRESS}{link}"


def _day(match: re.Match[str]) -> date:
    return date(int(match[3]), MONTHS.index(match[1]) + 1, int(match[2]))


def read_pages(pages: Sequence[Page], problems: Problems) -> Iterator[Document]:
    """The text of each page with the day of its release."""
    for page in pages:
        text = html_text(page.path.read_bytes()).replace(END_OF_TEXT, " ")
        if not text:
            problems.drop(page.source, "no text")
            continue
        released = page.released
        if released is None:
            month_end = page.day.replace(day=calendar.monthrange(page.day.year, page.day.month)[1])
            named = (_day(match) for match in DAY.finditer(text))
            same = [day for day in named if (day.year, day.month) == (page.day.year, page.day.month)]
            released = max(same, default=month_end)
        yield Document(text, page.source, page.day, released, page.path.stem)

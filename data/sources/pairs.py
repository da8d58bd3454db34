"""Columns that a price and a ticker name together, as yfinance's tables have them.

    Price,Close,Close,Volume,Volume     as pandas writes them to CSV: price, ticker, index, or ticker first
    Ticker,AAPL,MSFT,AAPL,MSFT
    Date,,,,

A column of two names is called by both as in parquet: "('Close', 'AAPL')".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

HEADER_LINES = 3
LEVELS = ("Price", "Ticker", "")  # what pandas calls the two lines; nothing in tables of older yfinance
CLOSES = ("adjclose", "adjustedclose", "close")  # the first that a ticker has is taken
PRICES = {*CLOSES, "open", "high", "low", "volume", "dividends", "stocksplits", "capitalgains"}
PAIR = re.compile(r"\('(.*)', '(.*)'\)")


def plain(name: str) -> str:
    """As in adjclose, whether it is written Adj Close, adj_close or Adj. Close."""
    return "".join(character for character in name.lower() if character.isalnum())


def joined_header(lines: Sequence[Sequence[str]]) -> list[str] | None:
    """Names of columns from the first HEADER_LINES lines of a CSV, None where they are no such header."""
    if len(lines) < HEADER_LINES or len({len(line) for line in lines}) > 1 or len(lines[0]) < 2:
        return None
    (first, *upper), (second, *lower), (index, *rest) = lines
    if first not in LEVELS or second not in LEVELS or not index or any(rest):
        return None
    names = [str(pair) for pair in zip(upper, lower, strict=True)]
    return [index, *names] if closes_of(names) else None


def closes_of(names: Iterable[str]) -> dict[str, str]:
    """Tickers by the columns of their closing prices, of columns with two names each; else nothing."""
    names = list(names)
    pairs = {name: found.groups() for name in names if (found := PAIR.fullmatch(name))}
    if len(pairs) < len(names):
        return {}
    for price, ticker in ((0, 1), (1, 0)):  # a ticker may be LOW or OPEN, but none is Close
        levels = {plain(pair[price]) for pair in pairs.values()}
        if levels <= PRICES and levels & set(CLOSES):
            by_ticker: dict[str, str] = {}
            ranked = sorted(pairs, key=lambda name: _rank(pairs[name][price]))
            for name in ranked:
                if plain(pairs[name][price]) in CLOSES:
                    by_ticker.setdefault(pairs[name][ticker], name)
            return {name: entity for entity, name in by_ticker.items()}
    return {}


def _rank(price: str) -> int:
    return CLOSES.index(plain(price)) if plain(price) in CLOSES else len(CLOSES)


def is_adjusted(name: str) -> bool:
    """Whether a column holds closing prices that later splits and dividends have changed."""
    found = PAIR.fullmatch(name)
    return any(plain(part) in CLOSES[:2] for part in (found.groups() if found else (name,)))

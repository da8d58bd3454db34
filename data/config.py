"""What `python -m data.prepare` can be told, and which of it can be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from data import card
from data.cleaning import Filters
from data.documents import END_OF_TEXT, DataError
from tapelm import Tokenizer

MOST_EMBARGO_DAYS = 36_500  # further back, dates leave the calendar
MOST_WEIGHT = 100.0
COLUMNS = ("text_column", "date_column", "entity_column", "value_column")
NO_COLUMN = "none"  # as the name of a column


@dataclass
class Config:
    """What to prepare, from where, and how to split it."""

    out: Path
    """Directory to write."""
    source: tuple[Literal["packages", "files", "rows", "news", "sec", "fed", "hf"], ...] = ("packages",)
    """One or more. packages: pinned data packages of the registry. files: your text. rows: your numbers.
    news: EODHD. sec: EDGAR filings. fed: FOMC minutes and Beige Books. hf: a Hugging Face dataset."""
    input: tuple[str, ...] = ()
    """Files, folders or globs of .txt, .jsonl, .csv and .parquet, plain, .gz or .zst, of text for --source
    files, of numbers for rows: date, entity, value (if need be field, unit, available_at), or date and a
    column for each entity, or the prices of one entity, after which the file is named."""
    view: Literal["text", "numbers"] = "text"
    """text: prose, and daily and monthly numbers told in words. numbers: rows as calendar and bin tokens."""
    tickers: tuple[str, ...] = ()
    """Companies of --source sec and news, as in AAPL; news without any takes the members of the S&P 500."""
    since: date | None = None
    """First day to fetch (news, sec, fed)."""
    to: date | None = None
    """Last day to fetch (news, sec, fed); give it for a result that does not grow with time."""
    user_agent: str = ""
    """Name and address of you, which EDGAR asks for: "Your Name you@example.com"."""
    dataset: str = ""
    """Name on the Hugging Face hub (--source hf)."""
    revision: str = "main"
    """Commit or branch of the dataset."""
    vocab_size: int = 8192
    """Most tokens the vocabulary may have."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a data directory or model that has one, to use instead of training one: what an
    earlier model can read. Nothing later than the training text should have gone into it."""
    text_column: tuple[str, ...] = ("text",)
    """Column or key that holds the text in .jsonl, .csv and .parquet; of several the first that a row has."""
    date_column: tuple[str, ...] = ("date",)
    """The same for the ISO date, "none" for undated text; a column available_at decides the split instead."""
    entity_column: tuple[str, ...] = ("entity",)
    """Column of --source rows that names the series; "none": the file is named after it."""
    value_column: tuple[str, ...] = ("value",)
    """Column of --source rows that holds its value."""
    split: Literal["date", "hash"] = "date"
    """date: by release date, undated documents by hash of the text. hash: all by hash, 90/5/5."""
    validation_from: date | None = None
    """First release day of the validation split; default: fixed for packages, else the last 10% of bytes,
    of the days of rows the last 20%."""
    test_from: date | None = None
    """First release day of the test split; default: fixed for packages, else the last 5% of bytes,
    of the days of rows the last 10%."""
    until: date | None = None
    """Documents released on or after this day are left out; default: fixed for packages, else none."""
    embargo_days: int = 31
    """Documents released in so many days before a cut are left out: what one document reports, a month."""
    weights: tuple[str, ...] = ()
    """DOMAIN=NUMBER: how often an epoch of train takes the documents of a domain; 0.5 takes half of them."""
    language: Literal["any", "en"] = "any"
    """en drops prose that is not English."""
    min_chars: int = 1
    """Shorter documents are dropped, counted after cleaning."""
    deduplicate: bool = True
    """Drop near-duplicates (MinHash, 80% of their five-word runs), keeping what was released first."""
    strict: bool = False
    """Stop at the first bad row instead of counting and skipping it."""
    min_block: int = 256
    """Longest training block to serve: every split needs so many tokens and one more."""
    cache: Path | None = None
    """Folder for downloads; default: tapelm in the user's cache folder."""
    force: bool = False
    """Rebuild even where OUT holds data."""

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as they go into the card."""
        names = ("view", "vocab_size", "split", "embargo_days", "min_block")
        names += ("language", "min_chars", "deduplicate")
        settings: dict[str, Any] = {"source": list(self.source), "tokenizer": None}  # SHA-256 of a given one
        settings |= {name: getattr(self, name) for name in names}
        settings |= {name: " ".join(getattr(self, name)) for name in COLUMNS}
        settings |= {"tickers": list(self.tickers), "dataset": self.dataset, "revision": self.revision}
        for name in ("validation_from", "test_from", "until", "since", "to"):
            day: date | None = getattr(self, name)
            settings[name] = day.isoformat() if day else None
        settings["weights"] = self.domain_weights()
        return settings

    def filters(self, tokenizer: Tokenizer | None = None) -> Filters:
        """What a document must be, for a given tokenizer without the text of its special tokens."""
        reserved = () if tokenizer is None else tuple(tokenizer.special_tokens)
        return Filters(min_chars=self.min_chars, language=self.language, reserved=reserved)

    def domain_weights(self) -> dict[str, float]:
        """--weights by domain. Raises DataError for what is not DOMAIN=NUMBER."""
        weights = {}
        for text in self.weights:
            name, equals, number = text.rpartition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not (name and equals and 0 <= weight <= MOST_WEIGHT):
                raise DataError(f"--weights takes DOMAIN=NUMBER with 0 to {MOST_WEIGHT:.0f}, got {text!r}")
            weights[name] = weight
        return dict(sorted(weights.items()))


def check(config: Config) -> None:
    """Raise DataError for settings that cannot be right, before anything is read or written."""
    if config.vocab_size < 257:
        raise DataError(f"--vocab-size must be at least 257: 256 bytes and {END_OF_TEXT}")
    if config.tokenizer is not None and config.vocab_size != Config.vocab_size:
        raise DataError("--vocab-size goes with a tokenizer that is trained, not with --tokenizer")
    if config.tokenizer is not None and config.view == "numbers":
        raise DataError("--view numbers makes its own tokenizer of bins and entities: leave out --tokenizer")
    for name in ("min_block", "min_chars"):
        if getattr(config, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.embargo_days <= MOST_EMBARGO_DAYS:
        raise DataError(
            f"embargo_days must not be negative or above {MOST_EMBARGO_DAYS}, got {config.embargo_days}"
        )
    for name in COLUMNS:
        if not getattr(config, name):
            raise DataError(f"--{name.replace('_', '-')} takes one or more names")
    config.domain_weights()
    if not config.source or len(set(config.source)) != len(config.source):
        raise DataError("--source takes one or more different sources")
    if not {"files", "rows"} & set(config.source) and config.input:
        raise DataError("--input goes with --source files or rows")
    if {"files", "rows"} <= set(config.source):
        raise DataError("--source files and rows would both read --input: prepare them one by one")
    if config.view == "numbers" and (config.split == "hash" or config.weights):
        raise DataError("--view numbers is split by date and has no --weights")
    if config.view == "numbers" and (others := sorted(set(config.source) - {"packages", "rows"})):
        raise DataError(f"--view numbers takes no --source {others[0]}: tables of numbers are --source rows")
    cuts = (config.validation_from, config.test_from, config.until)
    if config.split == "hash" and cuts != (None, None, None):
        raise DataError("--validation-from, --test-from and --until go with --split date")
    if "packages" not in config.source and (config.validation_from is None) != (config.test_from is None):
        raise DataError("--validation-from and --test-from go together")
    if config.out.exists():
        if not config.out.is_dir():
            raise DataError(f"--out {config.out} is a file; name a directory")
        if any(config.out.iterdir()) and card.read_card(config.out) is None:
            raise DataError(
                f"--out {config.out} holds other files and no {card.NAME}; name another directory"
            )

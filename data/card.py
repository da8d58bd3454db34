"""The data card: what a data directory holds, where it came from, and whether it is what was asked for."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from data.documents import LEAST_BY_HASH, SPLITS, DataError, SplitDates
from data.problems import Problems
from gpt.cli import wide_console
from tapelm import Tokenizer

NAME = "data_card.json"
PAGE = "data_card.html"
# Raised when the same settings and inputs begin to give other documents.
FORMAT = 5


@dataclass
class Tally:
    """What one source gave to one split; tokens count the end-of-text mark after each document."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    first: date | None = None
    last: date | None = None
    documents_by_year: Counter[int] = field(default_factory=Counter)
    tokens_by_year: Counter[int] = field(default_factory=Counter)

    def add(self, size: int, released: date | None, *, since: date | None = None) -> None:
        """Count a document of `size` bytes; since: the first release in one that has several."""
        self.documents += 1
        self.bytes += size
        if released is not None:
            since = since or released
            self.first = min(self.first or since, since)
            self.last = max(self.last or released, released)
            self.documents_by_year[released.year] += 1

    def add_tokens(self, tokens: int, released: date | None) -> None:
        """Count the tokens of a document."""
        self.tokens += tokens
        if released is not None:
            self.tokens_by_year[released.year] += tokens


@dataclass
class Counts:
    """Tallies by split and source; documents without a date, and that belong to no split; texts whose pieces
    lie in several."""

    tallies: dict[str, dict[str, Tally]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    undated: int = 0
    left_out: int = 0
    torn: int = 0

    def tally(self, split: str, source: str) -> Tally:
        """The tally of a source in a split, made when first asked for."""
        return self.tallies[split].setdefault(source, Tally())

    def total(self, split: str, name: str) -> int:
        """Sum of "documents", "bytes" or "tokens" over the sources of a split."""
        return sum(getattr(tally, name) for tally in self.tallies[split].values())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """One hash of all that decides the content: format, settings, and the SHA-256 of every input by name."""
    decisive = {"format": FORMAT, "settings": settings, "inputs": inputs}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def read_card(directory: Path) -> dict[str, Any] | None:
    """The card of a data directory, or None when it has none that is readable as one."""
    try:
        card = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return card if isinstance(card, dict) and "fingerprint" in card else None


def is_complete(directory: Path, card: Mapping[str, Any]) -> bool:
    """Whether every output the card lists is there as it was written."""
    return all(
        (directory / name).is_file()
        and (directory / name).stat().st_size == entry["bytes"]
        and sha256_of(directory / name) == entry["sha256"]
        for name, entry in card["outputs"].items()
    )


def other_files(directory: Path, card: Mapping[str, Any]) -> list[str]:
    """Files in the directory that are not of the data: someone has put them there."""
    ours = {*card["outputs"], NAME, PAGE}
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    return sorted(names - ours)


def describe_change(card: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """In words, the first thing in which the card differs from these settings and inputs."""
    for name, value in settings.items():
        before = card["settings"].get(name)
        if before != value:
            return f"{name} was {before}, now {value}"
    return "its inputs differ" if card["inputs"] != inputs else "prepared by another version of this program"


def make_card(
    directory: Path,
    counts: Counts,
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    origins: Mapping[str, tuple[str, str]],
    dates: SplitDates | None,
    problems: Problems,
    leaks: Mapping[str, Any],
    warnings: list[str],
) -> dict[str, Any]:
    """The card of a finished directory (not yet written); the same directory gives the same card."""
    outputs = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (NAME, PAGE)
    }
    domains = sorted({source for tallies in counts.tallies.values() for source in tallies})
    return {
        "format": FORMAT,
        "fingerprint": fingerprint(settings, inputs),
        "settings": dict(settings),
        "domains": {
            domain: dict(zip(("what", "licence"), origins[domain], strict=True)) for domain in domains
        },
        "splits": {
            split: {source: _tally_entry(tally) for source, tally in sorted(counts.tallies[split].items())}
            for split in SPLITS
        },
        "vocabulary": Tokenizer.load(directory / "tokenizer.json").vocab_size,
        "split_dates": _dates_entry(dates),
        "left_out_documents": counts.left_out,
        "undated_documents": counts.undated,
        **problems.entry(),
        "leak_check": dict(leaks),
        "warnings": warnings,
        "inputs": dict(inputs),
        "outputs": outputs,
        "versions": {
            "python": platform.python_version(),
            "tapelm": _version("tapelm"),
            "numpy": _version("numpy"),
        },
    }


def write_card(directory: Path, card: Mapping[str, Any]) -> None:
    """Write the card into its directory. Raises OSError."""
    (directory / NAME).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_table(card: dict[str, Any]) -> None:
    """Print size and time span of every split and source of a card, its sums, and how much is in no split."""
    tape = is_tape(card)
    units = ("runs", "rows", "tokens") if tape else ("docs", "MB", "tokens")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("split", "source", *units, "released"):
        table.add_column(name, justify="right" if name in units else "left", no_wrap=True)
    for split, sources in card["splits"].items():
        for source, tally in sources.items():
            span = f"{tally['first']}..{tally['last']}" if tally["first"] else "no dates"
            size = f"{tally['bytes']:,}" if tape else f"{tally['bytes'] / 1e6:.3f}"
            table.add_row(split, source, f"{tally['documents']:,}", size, f"{tally['tokens']:,}", span)
        table.add_section()
    console = wide_console()
    console.print(table)
    for line in (*_sums(card), *_left_out(card)):
        console.print(line, soft_wrap=True, highlight=False)


def _sums(card: Mapping[str, Any]) -> Iterator[str]:
    """The vocabulary, which cards of earlier versions do not have, and the tokens of every split.

    A tokenizer that is trained stops where no pair of tokens occurs twice.
    """
    sums = ", ".join(
        f"{split} {sum(tally['tokens'] for tally in sources.values()):,}"
        for split, sources in card["splits"].items()
    )
    vocabulary, settings = "", card["settings"]
    if "vocabulary" in card:
        most = settings["vocab_size"]
        trained = settings.get("tokenizer") is None and not is_tape(card) and card["vocabulary"] < most
        vocabulary = f"vocabulary {card['vocabulary']:,}{f' of at most {most:,}' if trained else ''}; "
    yield f"{vocabulary}tokens: {sums}"


def _left_out(card: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on the cuts, and on the documents that are in no split."""
    dates = card["split_dates"]
    if dates is not None:
        until = f", until {dates['until']}" if dates["until"] else ""
        yield f"validation from {dates['validation_from']}, test from {dates['test_from']}{until}"
    told = []
    if card["left_out_documents"]:
        told.append(f"{card['left_out_documents']:,} left out ({left_out_of(card)})")
    reasons: Counter[str] = Counter()
    for dropped in card["dropped_documents"].values():
        reasons.update(dropped)
    told += [f"{count:,} dropped ({reason})" for reason, count in reasons.items()]
    if told:
        yield f"{'rows' if is_tape(card) else 'documents'}: {', '.join(told)}"


def is_tape(card: Mapping[str, Any]) -> bool:
    """Whether the card is that of a tape of numbers, whose documents are runs of rows."""
    return card["settings"].get("view") == "numbers"


def left_out_of(card: Mapping[str, Any]) -> str:
    """Where what is in no split was released, as in 31 days before a cut."""
    dates = card["split_dates"]
    if is_tape(card):
        gap = f"{card['leak_check']['embargo_rows']} rows before a cut"
    else:
        gap = f"{dates['embargo_days']} days before a cut"
    return f"{gap} or from {dates['until']} on" if dates["until"] else gap


def check_sizes(counts: Counts, min_block: int, *, encoded: bool = False) -> None:
    """Raise DataError, naming the size needed, when a split is empty or, once encoded, below one block."""
    documents = sum(counts.total(split, "documents") for split in SPLITS)
    size = sum(counts.total(split, "bytes") for split in SPLITS)
    if not documents:
        left_out = f" ({counts.left_out} were released outside the split dates)" if counts.left_out else ""
        raise DataError(f"the corpus is empty: no document with text in the input{left_out}")
    # Twice the mean of a split of 5% allows for chance.
    tokens = sum(counts.total(split, "tokens") for split in SPLITS) or size / 3
    needed = max(LEAST_BY_HASH * size / documents, 40 * (min_block + 1) * size / tokens)
    advice = f"the corpus has {size / 1e3:,.3f} kB, about {math.ceil(needed / 1e3):,} kB are needed"
    if size >= needed:
        advice = "move --validation-from, --test-from or --until, or lower --embargo-days"
    for split in SPLITS:
        if not counts.total(split, "documents"):
            raise DataError(f"the {split} split is empty: {advice}")
        found = counts.total(split, "tokens")
        if encoded and found < min_block + 1:
            raise DataError(
                f"the {split} split has {found} tokens, a block of {min_block} needs "
                f"{min_block + 1}: {advice}, or lower --min-block"
            )


def _tally_entry(tally: Tally) -> dict[str, Any]:
    return {
        "documents": tally.documents,
        "bytes": tally.bytes,
        "tokens": tally.tokens,
        "first": tally.first.isoformat() if tally.first else None,
        "last": tally.last.isoformat() if tally.last else None,
        "documents_by_year": {str(year): count for year, count in sorted(tally.documents_by_year.items())},
        "tokens_by_year": {str(year): count for year, count in sorted(tally.tokens_by_year.items())},
    }


def read_split_dates(card: Mapping[str, Any]) -> SplitDates | None:
    """The cuts a card gives, None when its documents are split by hash."""
    entry = card["split_dates"]
    if entry is None:
        return None
    days = {name: entry[name] and date.fromisoformat(entry[name]) for name in _DAYS}
    return SplitDates(**days, embargo_days=entry["embargo_days"])


_DAYS = ("validation_from", "test_from", "until")


def _dates_entry(dates: SplitDates | None) -> dict[str, Any] | None:
    if dates is None:
        return None
    return {
        "validation_from": dates.validation_from.isoformat(),
        "test_from": dates.test_from.isoformat(),
        "until": dates.until.isoformat() if dates.until else None,
        "embargo_days": dates.embargo_days,
    }


def _version(package: str) -> str | None:
    """None when run from a checkout that is on the path but not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""From a source to split documents: cleaned, filtered, without copies.

Memory does not grow with the text: documents are spilled to one file while a few numbers on
each are kept, and what is decided from those (copies, cuts, splits) is then applied to its lines.
"""

from __future__ import annotations

import shutil
from array import array
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.progress import Progress

from data.card import Counts
from data.cleaning import Filters, clean_document
from data.config import Config
from data.corpus import Corpus
from data.documents import (
    LEAST_BY_HASH,
    SPLITS,
    DataError,
    Document,
    SplitDates,
    choose_split_dates,
    split_by_hash,
)
from data.duplicates import UNDATED, NearDuplicates
from data.problems import Problems

LEFT_OUT = len(SPLITS)  # the code of a document that belongs to no split
LEAST_SHARE, MOST_SHARE = 0.01, 0.2  # of the bytes of a held-out split whose texts are kept whole


@dataclass
class Ledger:
    """A few numbers on every document of the spill file, in its order."""

    sources: dict[str, int] = field(default_factory=dict)
    source: array[int] = field(default_factory=lambda: array("i"))
    day: array[int] = field(default_factory=lambda: array("i"))
    size: array[int] = field(default_factory=lambda: array("q"))
    text_hash: array[int] = field(default_factory=lambda: array("Q"))
    id_hash: array[int] = field(default_factory=lambda: array("Q"))
    group_hash: array[int] = field(default_factory=lambda: array("Q"))
    split_of_text: array[int] = field(default_factory=lambda: array("b"))
    split_of_group: array[int] = field(default_factory=lambda: array("b"))

    def add(self, document: Document) -> None:
        text = document.text.encode()
        released = document.available_at
        self.source.append(self.sources.setdefault(document.source, len(self.sources)))
        self.day.append(UNDATED if released is None else released.toordinal())
        self.size.append(len(text))
        self.text_hash.append(_hash(text))
        self.id_hash.append(_hash(str(document.id).encode()))
        split = SPLITS.index(split_by_hash(document.text))
        self.split_of_text.append(split)
        if document.group is None:
            self.group_hash.append(self.text_hash[-1])
            self.split_of_group.append(split)
        else:
            self.group_hash.append(_hash(document.group.encode()))
            self.split_of_group.append(SPLITS.index(split_by_hash(document.group)))

    def names(self) -> list[str]:
        return list(self.sources)

    def days(self) -> np.ndarray:
        return np.array(self.day, dtype=np.int32)


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def collect(
    config: Config, corpus: Corpus, filters: Filters, staging: Path, problems: Problems, progress: Progress
) -> tuple[Counts, SplitDates | None]:
    """Write staging/documents/{train,val,test}.jsonl; returns their counts and the cuts, if by date.

    Raises DataError when nothing is left or no cuts can be found, ImportError where rensa is missing.
    """
    folder = staging / "documents"
    folder.mkdir()
    scratch = staging / "scratch"
    spill = scratch / "documents.jsonl"
    ledger = Ledger()
    sketches = NearDuplicates(scratch) if config.deduplicate else None
    scratch.mkdir(exist_ok=True)
    with open(spill, "w", encoding="utf-8", newline="\n") as file:
        for document in progress.track(corpus.read(problems), total=None, description="documents"):
            cleaned = clean_document(document, filters, problems)
            if cleaned is not None:
                named = _named(cleaned)
                file.write(named.to_json() + "\n")
                ledger.add(named)
                if sketches is not None:
                    sketches.add(named.text)
    copies = _copies(ledger, sketches, problems)
    dates = _split_dates(config, corpus, ledger, copies)
    hashed = ~copies if dates is None else ~copies & (ledger.days() == UNDATED)
    codes = _splits(ledger, dates, hashed)
    counts = _distribute(spill, folder, ledger, copies, codes)
    counts.torn = _torn(np.array(ledger.group_hash, dtype=np.uint64)[hashed], codes[hashed])
    shutil.rmtree(scratch)
    return counts, dates


def _named(document: Document) -> Document:
    """The document with an id: its own, else one made of source, day and text."""
    if document.id is not None:
        return document
    day = document.available_at.isoformat() if document.available_at else "undated"
    name = f"{document.source}-{day}-{blake2b(document.text.encode(), digest_size=6).hexdigest()}"
    return replace(document, id=name)


def _copies(ledger: Ledger, sketches: NearDuplicates | None, problems: Problems) -> np.ndarray:
    """(documents,) bool: what repeats the id, the text or nearly the text of one released before it."""
    days, sources = ledger.days(), np.array(ledger.source, dtype=np.int32)
    order = np.argsort(days, kind="stable")
    ids = _repeats(np.array(ledger.id_hash, dtype=np.uint64), order)
    texts = _repeats(np.array(ledger.text_hash, dtype=np.uint64), order)
    near = np.zeros_like(ids)
    if sketches is not None:
        near = sketches.find(days)
        sketches.close()
    reasons = (("same text", texts), ("same id", ids & ~texts), ("near-duplicate", near & ~texts & ~ids))
    for reason, found in reasons:
        for source, count in Counter(sources[found].tolist()).items():
            problems.drop(ledger.names()[source], reason, count)
    return ids | texts | near


def _repeats(hashes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Which hashes occur earlier in the order."""
    _, first = np.unique(hashes[order], return_index=True)
    repeated = np.ones(len(hashes), dtype=bool)
    repeated[order[first]] = False
    return repeated


def _split_dates(config: Config, corpus: Corpus, ledger: Ledger, copies: np.ndarray) -> SplitDates | None:
    """The cuts, read off the documents where they are not given; None when documents are split by hash."""
    if config.split == "hash":
        return None
    given = given_dates(config, corpus)
    if given is not None:
        return given
    days, sizes = ledger.days(), np.array(ledger.size)
    kept = ~copies & (days != UNDATED)
    unique, where = np.unique(days[kept], return_inverse=True)
    totals = np.bincount(where, weights=sizes[kept].astype(np.float64))
    bytes_by_day = {date.fromordinal(int(day)): int(total) for day, total in zip(unique, totals, strict=True)}
    return choose_split_dates(bytes_by_day, config.embargo_days, config.until) if bytes_by_day else None


def given_dates(config: Config, corpus: Corpus) -> SplitDates | None:
    """The cuts of the settings or, where these have none, of the source."""
    validation_from, test_from, until = config.validation_from, config.test_from, config.until
    if corpus.dates is not None:
        validation_from = validation_from or corpus.dates.validation_from
        test_from = test_from or corpus.dates.test_from
        until = until or corpus.dates.until
    if validation_from is None or test_from is None:
        return None
    return SplitDates(validation_from, test_from, until, config.embargo_days)


def _splits(ledger: Ledger, dates: SplitDates | None, hashed: np.ndarray) -> np.ndarray:
    """(documents,) codes: positions in SPLITS, or LEFT_OUT. `hashed` are those that no date decides.

    By hash, groups stay together where they are many and come near the shares of the splits.
    """
    days = ledger.days()
    by_group = np.array(ledger.split_of_group, dtype=np.int8)
    sizes = np.bincount(by_group[hashed], weights=np.array(ledger.size)[hashed], minlength=len(SPLITS))
    shares = sizes[1:] / max(1, sizes.sum())
    many = len(np.unique(np.array(ledger.group_hash, dtype=np.uint64)[hashed])) >= LEAST_BY_HASH
    whole = many and (shares > LEAST_SHARE).all() and (shares < MOST_SHARE).all()
    codes = by_group if whole else np.array(ledger.split_of_text, dtype=np.int8)
    if dates is not None:
        dated = days != UNDATED
        unique, where = np.unique(days[dated], return_inverse=True)
        splits = (dates.split_of(date.fromordinal(int(day))) for day in unique)
        by_day = [LEFT_OUT if split is None else SPLITS.index(split) for split in splits]
        codes[dated] = np.array(by_day, dtype=np.int8)[where]
    return codes


def _torn(groups: np.ndarray, codes: np.ndarray) -> int:
    """How many groups lie in more than one split."""
    places = np.unique(np.stack([groups, codes.astype(np.uint64)]), axis=1)[0]
    return int((np.unique(places, return_counts=True)[1] > 1).sum())


def _distribute(spill: Path, folder: Path, ledger: Ledger, copies: np.ndarray, codes: np.ndarray) -> Counts:
    """Copy the lines of the spill file that stay to the file of their split."""
    counts = Counts()
    names = ledger.names()
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{split}.jsonl", "wb")) for split in SPLITS]
        lines = stack.enter_context(open(spill, "rb"))
        numbers = zip(lines, ledger.source, ledger.day, ledger.size, strict=True)
        for number, (line, source, day, size) in enumerate(numbers):
            if copies[number]:
                continue
            released = None if day == UNDATED else date.fromordinal(day)
            counts.undated += released is None
            if codes[number] == LEFT_OUT:
                counts.left_out += 1
                continue
            files[codes[number]].write(line)
            counts.tally(SPLITS[codes[number]], names[source]).add(size, released)
    return counts


def check_sources(config: Config, counts: Counts) -> None:
    """Raise DataError for a weight of a domain that the train split does not have."""
    unknown = set(config.domain_weights()) - set(counts.tallies["train"])
    if unknown:
        known = ", ".join(sorted(counts.tallies["train"]))
        raise DataError(f"--weights: train has no domain {sorted(unknown)[0]!r}; it has {known}")

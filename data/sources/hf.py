"""A dataset of the Hugging Face hub, streamed: --dataset NAME with --text-column and --date-column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib import import_module
from itertools import chain, islice
from typing import Any

from rich.progress import Progress

from data.config import Config
from data.corpus import Corpus, Origin
from data.documents import DataError, Document
from data.problems import Problems
from data.sources.columns import HEAD_ROWS, Columns, check_columns
from data.sources.files import read_table


def open_corpus(config: Config, progress: Progress) -> Corpus:
    """The train part of the dataset at --revision. Raises DataError without `datasets` or such a dataset."""
    if not config.dataset:
        raise DataError("--source hf needs --dataset NAME, as in --dataset owner/name")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise DataError("--source hf needs datasets; install it with: pip install datasets") from error
    name, revision = config.dataset, config.revision
    task = progress.add_task(f"dataset {name}", total=1)
    try:
        table: Iterable[dict[str, Any]] = datasets.load_dataset(
            name, split="train", streaming=True, revision=revision
        )
    except (OSError, ValueError) as error:  # what the library raises for unknown names and no connection
        raise DataError(f"cannot load dataset {name} at {revision}: {type(error).__name__}") from error
    progress.advance(task)
    columns = Columns.of(config)
    domain = name.split("/")[-1]

    def read(problems: Problems) -> Iterator[Document]:
        records = ((f"{name}, row {number}", record) for number, record in enumerate(table))
        head = list(islice(records, HEAD_ROWS))
        check_columns(name, [record for _, record in head], columns, problems)
        return read_table(chain(head, records), columns, domain, problems)

    # The hub's revision stands for the content: rows are streamed and never on this disk.
    inputs = {f"{name}@{revision}": sha256(f"{name}@{revision}".encode()).hexdigest()}
    origins = {domain: Origin(f"Hugging Face dataset {name}", "see the dataset's page")}
    return Corpus(read, inputs, origins=origins)

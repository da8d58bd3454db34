"""Documents into a tokenizer fitted on train alone, and into token shards."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress

from data import leaks
from data.card import Counts, sha256_of
from data.config import Config
from data.documents import END_OF_TEXT, SPLITS, DataError, Document, read_jsonl, write_jsonl
from data.problems import Problems
from tapelm import Tokenizer, write_shards

ENCODE_BATCH = 256
# Merges do not change for the better with more text than this; of more, evenly spread documents are taken.
TOKENIZER_BYTES = 256_000_000


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer to encode documents with. Raises DataError for none, or one that cannot end a document."""
    try:
        tokenizer = Tokenizer.load(path)
    except OSError as error:
        raise DataError(f"--tokenizer {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"--tokenizer: {error}") from error
    if END_OF_TEXT not in tokenizer.special_tokens:
        raise DataError(f"--tokenizer {path} has no {END_OF_TEXT}, which ends every document")
    return tokenizer


def hash_of(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer.json that it is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return sha256_of(path)


def write_tokens(
    config: Config,
    staging: Path,
    counts: Counts,
    problems: Problems,
    progress: Progress,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write tokenizer.json, trained unless given, and the shards; tokens go into the tallies of `counts`.

    Held-out documents of which train has most are left out: boilerplate, and parts of one text that a hash
    has put into several splits.
    """
    task = progress.add_task("tokenizer", total=None)
    if tokenizer is None:
        train = staging / "documents" / "train.jsonl"
        share = min(1.0, TOKENIZER_BYTES / max(1, counts.total("train", "bytes")))
        texts = (document.text for document in read_jsonl(train) if chance(document, 0) < share)
        tokenizer = Tokenizer.train(texts, config.vocab_size, (END_OF_TEXT,))
    tokenizer.save(staging / "tokenizer.json")
    progress.update(task, total=1, completed=1)
    weights = config.domain_weights()
    for split in SPLITS:
        task = progress.add_task(f"{split} tokens", total=counts.total(split, "documents"))
        documents = read_jsonl(staging / "documents" / f"{split}.jsonl")
        if split == "train" and weights:
            documents = repeated(staging / "documents" / "train.jsonl", weights)
        _write_split(tokenizer, documents, staging, split, counts, partial(progress.advance, task))
    for held_out in list(leaks.compare(staging)):
        if repeats := set(held_out.repeats().tolist()):
            _leave_out(repeats, tokenizer, staging, held_out.split, counts, problems)


def _write_split(
    tokenizer: Tokenizer,
    documents: Iterator[Document],
    staging: Path,
    split: str,
    counts: Counts,
    advance: Callable[[int], None],
) -> None:
    write_shards(
        _encode(tokenizer, documents, split, counts, advance),
        staging / split,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.special_tokens[END_OF_TEXT],
    )


def _leave_out(
    numbers: set[int], tokenizer: Tokenizer, staging: Path, split: str, counts: Counts, problems: Problems
) -> None:
    """Write a held-out split again without the documents of these numbers, as training has seen them."""
    path = staging / "documents" / f"{split}.jsonl"
    counts.tallies[split] = {}

    def kept() -> Iterator[Document]:
        for number, document in enumerate(read_jsonl(path)):
            if number in numbers:
                problems.drop(document.source, "mostly in train")
                counts.undated -= document.available_at is None
            else:
                counts.tally(split, document.source).add(len(document.text.encode()), document.available_at)
                yield document

    write_jsonl(path, kept())
    shutil.rmtree(staging / split)
    _write_split(tokenizer, read_jsonl(path), staging, split, counts, lambda _: None)


def repeated(path: Path, weights: Mapping[str, float]) -> Iterator[Document]:
    """Documents of a file in rounds, each as often as the weight of its domain (1 without one) says.

    A weight of 2.3 puts a document into two rounds and, by its hash, three documents in ten into a third.
    """
    most = max(1, math.ceil(max(weights.values())))
    for turn in range(most):
        for document in read_jsonl(path):
            left = weights.get(document.source, 1.0) - turn
            if left >= 1 or (left > 0 and chance(document, turn + 1) < left):
                yield document


def chance(document: Document, turn: int) -> float:
    """A number in [0, 1) that depends on the document's text and the turn alone."""
    digest = blake2b(document.text.encode(), digest_size=8, salt=turn.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "big") / 2**64


def _encode(
    tokenizer: Tokenizer,
    documents: Iterator[Document],
    split: str,
    counts: Counts,
    advance: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """Token ids of each document, uint32, without the end-of-text mark that write_shards adds."""
    while batch := list(islice(documents, ENCODE_BATCH)):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            counts.tally(split, document.source).add_tokens(len(ids) + 1, document.available_at)
            yield ids
        advance(len(batch))

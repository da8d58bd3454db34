"""The leak checker: fails when a prepared directory lets training see what it is validated on.

    python -m data.leaks runs/data

It trusts nothing that prepared the directory. From the documents: a release day outside its split or its
embargo, an id that occurs twice. From the token shards, which are what a model sees: a validation or test
document most of whose 13-grams occur in train. From a tape of numbers: bins that are not those of the train
rows. Everything is streamed; of very many 13-grams an even share, chosen by hash, is compared.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data import card
from data.documents import END_OF_TEXT, SPLITS, DataError, Document, SplitDates, read_jsonl
from data.numbers import TAPE
from data.tape_check import check_tape
from gpt.cli import UserError, parse_options, run_program
from gpt.corpus import token_arrays
from tapelm import Tokenizer

GRAM = 13  # tokens
MOST_OVERLAP = 0.9  # of a document's 13-grams; notes of one template and similar numbers share up to 0.83
MUCH = "no copy, but most of it is in train: bits per byte will say little about new text"
FEWEST_GRAMS = 20  # in a document that is judged
FEWEST_SAMPLED = 8  # the same where only a share of them is compared
MOST_GRAMS = 1 << 23  # of held-out text that are remembered, 64 MB
CHUNK = 1 << 19  # tokens hashed at a time
BEGINNING = 24  # bits of a hash that tell at once that most others are different
REST = np.uint64(64 - BEGINNING)
MULTIPLIER = 0x9E3779B97F4A7C15
POWERS = np.array([pow(MULTIPLIER, power, 2**64) for power in range(1, GRAM + 1)], dtype=np.uint64)


def check(directory: Path, dates: SplitDates | None) -> dict[str, Any]:
    """What was compared and how much overlaps, for the data card.

    dates: the cuts, None where documents were split by hash. Raises DataError naming the first leak, with
    file and line.
    """
    if (directory / TAPE).is_file() and dates is not None:
        return check_tape(directory, dates)
    _check_documents(directory, dates)
    found: dict[str, Any] = {"gram_tokens": GRAM}
    for held_out in compare(directory):
        found["share_compared"] = 1 / held_out.stride
        found[held_out.split] = {
            "grams": int(held_out.seen.size),
            "seen_in_train": int(held_out.seen.sum()),
            "highest_overlap": round(float(held_out.overlaps.max(initial=0.0)), 4),
        }
        repeats = held_out.repeats()
        if repeats.size:
            worst = int(held_out.overlaps.argmax())
            raise DataError(
                f"leak: {directory / 'documents' / f'{held_out.split}.jsonl'}, line {worst + 1}: "
                f"{held_out.overlaps[worst]:.0%} of the document's {GRAM}-grams are in train"
            )
    return found


@dataclass(frozen=True)
class HeldOut:
    """Of 1 / `stride` of a split's 13-grams which train has, and the share of each of its documents."""

    split: str
    stride: int
    seen: np.ndarray
    overlaps: np.ndarray

    def repeats(self) -> np.ndarray:
        """Numbers of the documents most of which train has."""
        return np.flatnonzero(self.overlaps > MOST_OVERLAP)


def compare(directory: Path) -> Iterator[HeldOut]:
    """The held-out splits of a directory with a tokenizer and shards, one after the other."""
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    end_of_text = tokenizer.special_tokens[END_OF_TEXT]
    held_out = [split for split in SPLITS if split != "train"]
    tokens = sum(array.size for split in held_out for array in token_arrays(directory / split))
    stride = max(1, -(-tokens // MOST_GRAMS))
    found = [_grams(directory / split, end_of_text, stride) for split in held_out]
    together = np.concatenate([grams for grams, _ in found])
    seen = _seen_in_train(directory / "train", end_of_text, stride, together)  # which is read once for both
    fewest = max(FEWEST_SAMPLED, FEWEST_GRAMS // stride)
    for split, (grams, documents) in zip(held_out, found, strict=True):
        of_split, seen = seen[: grams.size], seen[grams.size :]
        yield HeldOut(split, stride, of_split, _overlaps(of_split, documents, fewest))


def _check_documents(directory: Path, dates: SplitDates | None) -> None:
    """Raise DataError for a document outside its split, or for an id that occurs twice."""
    ids: list[np.ndarray] = []
    ends: list[int] = []
    for split in SPLITS:
        path = directory / "documents" / f"{split}.jsonl"
        hashes = [_checked_id(document, split, dates, path, line) for line, document in _numbered(path)]
        ids.append(np.array(hashes, dtype=np.uint64))
        ends.append(len(hashes))
    everything = np.concatenate(ids)
    order = np.argsort(everything, kind="stable")
    repeated = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    if repeated.size:
        first, second = (int(order[repeated[0] + step]) for step in (0, 1))
        raise DataError(
            f"leak: {_place(directory, first, ends)} and {_place(directory, second, ends)} have the same id"
        )


def _numbered(path: Path) -> Iterator[tuple[int, Document]]:
    return enumerate(read_jsonl(path), 1)  # type: ignore[return-value]


def _checked_id(document: Document, split: str, dates: SplitDates | None, path: Path, line: int) -> int:
    released = document.available_at
    if dates is not None and released is not None and dates.split_of(released) != split:
        raise DataError(
            f"leak: {path}, line {line}: released {released}, which is not a day of the {split} split "
            f"(validation from {dates.validation_from}, test from {dates.test_from}, until {dates.until}, "
            f"embargo {dates.embargo_days} days)"
        )
    name = document.id if document.id is not None else f"{path}:{line}"
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _place(directory: Path, position: int, ends: list[int]) -> str:
    for split, count in zip(SPLITS, ends, strict=True):
        if position < count:
            return f"{directory / 'documents' / f'{split}.jsonl'}, line {position + 1},"
        position -= count
    raise IndexError(position)


def _hashed(shards: Path, end_of_text: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(hashes, document numbers) of the 13-grams inside documents, those with hash % stride == 0."""
    carried = np.zeros(0, dtype=np.int64)
    document = 0  # number of the document in which the carried tokens begin
    for array in token_arrays(shards):
        for start in range(0, array.size, CHUNK):
            ids = np.concatenate((carried, array[start : start + CHUNK].astype(np.int64)))
            ends = np.concatenate(([0], np.cumsum(ids == end_of_text)))  # before each position
            count = max(0, ids.size - GRAM + 1)
            hashes = np.zeros(count, dtype=np.uint64)
            for step in range(GRAM):
                hashes += (ids[step : step + count].astype(np.uint64) + np.uint64(1)) * POWERS[step]
            hashes ^= hashes >> np.uint64(29)
            inside = ends[:count] == ends[GRAM : GRAM + count]
            chosen = np.flatnonzero(inside & (hashes % np.uint64(stride) == 0))
            yield hashes[chosen], document + ends[chosen]
            carried = ids[count:]
            document += int(ends[count])


def _grams(shards: Path, end_of_text: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    parts = list(_hashed(shards, end_of_text, stride))
    return np.concatenate([hashes for hashes, _ in parts]), np.concatenate([number for _, number in parts])


def _seen_in_train(train: Path, end_of_text: int, stride: int, grams: np.ndarray) -> np.ndarray:
    """(grams,) bool: which of the hashes occur among those of train."""
    unique, where = np.unique(grams, return_inverse=True)
    seen = np.zeros(unique.size, dtype=bool)
    begins = np.zeros(1 << BEGINNING, dtype=bool)  # 16 MB, by which most of train's are ruled out
    begins[unique >> REST] = True
    for hashes, _ in _hashed(train, end_of_text, stride):
        hashes = hashes[begins[hashes >> REST]]
        if hashes.size:
            places = np.minimum(np.searchsorted(unique, hashes), unique.size - 1)
            seen[places[unique[places] == hashes]] = True
    return seen[where]


def _overlaps(seen: np.ndarray, documents: np.ndarray, fewest: int) -> np.ndarray:
    """The share of a document's 13-grams that train has, 0 for documents with fewer than `fewest`."""
    totals = np.bincount(documents)
    shared = np.bincount(documents, weights=seen.astype(np.float64), minlength=totals.size)
    return np.where(totals >= fewest, shared / np.maximum(totals, 1), 0.0)


@dataclass(frozen=True)
class LeaksConfig:
    directory: tyro.conf.Positional[Path]
    """What data.prepare has written."""


def main(arguments: list[str]) -> int:
    config = parse_options(LeaksConfig, arguments, prog="python -m data.leaks", description=__doc__)
    directory = config.directory
    made = card.read_card(directory)
    if made is None:
        raise UserError(f"{directory} holds no {card.NAME}: prepare it with python -m data.prepare")
    try:
        found = check(directory, card.read_split_dates(made))
    except DataError as error:
        raise UserError(str(error)) from error
    if "rows" in found:
        print(f"{found['rows']:,} rows, bins of train, an embargo of {found['embargo_rows']} rows: no leak")
    for split in SPLITS:
        if split in found:
            numbers = found[split]
            print(
                f"{split}: {numbers['seen_in_train']:,} of {numbers['grams']:,} {GRAM}-grams are in train, "
                f"at most {numbers['highest_overlap']:.1%} of a document: "
                + ("no leak" if 2 * numbers["seen_in_train"] <= numbers["grams"] else MUCH)
            )
    return 0


if __name__ == "__main__":
    run_program(main)

"""Plain text into documents: neighbouring paragraphs joined, long ones cut at the ends of sentences."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from data.documents import END_OF_TEXT
from data.problems import Problems
from data.sources.formats import CHUNK_BYTES, read_lines

PACK_BYTES = 2048
MAX_BYTES = 8192


def read_texts(path: Path, problems: Problems) -> Iterator[tuple[str, str | None]]:
    """Texts of about PACK_BYTES out of a file of paragraphs; <|endoftext|> separates in any case.

    Each with a hash of all that lies between two marks, of a megabyte at most; None where it is all of that.
    """
    for section in _sections(path, problems):
        texts = [*pack_paragraphs(section)]
        whole = None if len(texts) < 2 else sha256("\n\n".join(texts).encode()).hexdigest()
        yield from ((text, whole) for text in texts)


def pack_paragraphs(paragraphs: Iterator[str]) -> Iterator[str]:
    """Join neighbouring paragraphs into texts of about PACK_BYTES, cutting long ones to at most MAX_BYTES."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        for piece in _pieces(paragraph):
            length = len(piece.encode()) + 2
            if held and size + length > MAX_BYTES:
                yield "\n\n".join(held)
                held, size = [], 0
            held.append(piece)
            size += length
            if size >= PACK_BYTES:
                yield "\n\n".join(held)
                held, size = [], 0
    if held:
        yield "\n\n".join(held)


def _pieces(paragraph: str) -> Iterator[str]:
    """Cut at the last sentence end, else the last space, before MAX_BYTES less the joining blank line."""
    limit = MAX_BYTES - 2
    while len(paragraph.encode()) > limit:
        head = paragraph.encode()[:limit].decode(errors="ignore")
        cut = max(head.rfind(". ") + 1, head.rfind("\n"))
        if cut < limit // 4:
            cut = head.rfind(" ")
        if cut <= 0:
            cut = len(head)
        yield paragraph[:cut].rstrip()
        paragraph = paragraph[cut:].lstrip()
    if paragraph:
        yield paragraph


def _sections(path: Path, problems: Problems) -> Iterator[Iterator[str]]:
    """Runs of paragraphs between <|endoftext|> marks; a packed document never crosses a mark."""
    pending: list[str] = []
    for paragraph in _paragraphs(path, problems):
        first, *rest = paragraph.split(END_OF_TEXT)
        pending.append(first)
        for part in rest:
            yield (text.strip() for text in pending if text.strip())
            pending = [part]
        if sum(map(len, pending)) > CHUNK_BYTES:
            yield (text.strip() for text in pending if text.strip())
            pending = []
    yield (text.strip() for text in pending if text.strip())


def _paragraphs(path: Path, problems: Problems) -> Iterator[str]:
    """Blocks of lines separated by blank lines; one over MAX_BYTES ends at a line end, to bound memory."""
    block: list[str] = []
    size = 0
    for _, line in read_lines(path, problems, cut=True):
        length = len(line.encode())
        blank = not line.strip()
        if block and (blank or size + length > MAX_BYTES):
            yield "\n".join(block)
            block, size = [], 0
        if not blank:
            block.append(line.rstrip("\n"))
            size += length
    if block:
        yield "\n".join(block)

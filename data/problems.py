"""Bad rows and dropped documents: each counted by kind, the first of a kind named by file and line.

What is kept is the place and a fixed word for the reason, never a piece of the text, so that a card or a log
can be shown to anyone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from data.documents import DataError

EXAMPLES = 5
NOT_UTF8 = "not UTF-8"
LINE = re.compile(r"(.*), (?:line|row) (\d+)(?:, column .*)?", re.DOTALL)


@dataclass
class Problems:
    """What could not be used.

    strict: the first bad row raises instead of being skipped. rows: how many by kind. places: the first
    EXAMPLES of a kind, by line. dropped: documents that cleaning, filters or deduplication left out, by
    source and reason. notes: how many and the first place, by sentence.
    """

    strict: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, sentence: str, place: str) -> None:
        """Count what was kept and the user should know, as in note("no column 'date'", "news.csv")."""
        count, first = self.notes.get(sentence, (0, place))
        self.notes[sentence] = (count + 1, min(first, place, key=_order))

    def skip(self, kind: str, place: str, advice: str = "") -> None:
        """Count a bad row, as in skip("not JSON", "news.jsonl, line 3"). Raises DataError when strict."""
        if self.strict:
            raise DataError(f"{place}: {kind}" + (f"; {advice}" if advice else ""))
        self.rows[kind] = self.rows.get(kind, 0) + 1
        self.places[kind] = sorted([*self.places.get(kind, []), place], key=_order)[:EXAMPLES]

    def drop(self, source: str, reason: str, count: int = 1) -> None:
        """Count documents of a source that are left out on purpose."""
        reasons = self.dropped.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + count

    def warnings(self) -> list[str]:
        """A sentence on each note, and one on all bad rows that names the first of them."""
        told = []
        for sentence, (count, first) in self.notes.items():
            told.append(f"{first}: {sentence}" + (f" (and {count - 1:,} more)" if count > 1 else ""))
        if self.rows:
            kinds = sorted(self.rows, key=lambda kind: (-self.rows[kind], kind))
            counts = ", ".join(f"{self.rows[kind]} {kind}" for kind in kinds)
            kind = min(kinds, key=lambda kind: _order(self.places[kind][0]))
            hint = "; iconv -t utf-8 converts files that are not UTF-8" if NOT_UTF8 in kinds else ""
            told.append(
                f"bad rows were skipped: {counts}; the first: {self.places[kind][0]}: {kind} "
                f"(data_card.json names more, --strict stops at the first{hint})"
            )
        return told

    def entry(self) -> dict[str, Any]:
        """What the data card says about it."""
        return {
            "bad_rows": {
                kind: {"count": self.rows[kind], "first": self.places[kind]} for kind in sorted(self.rows)
            },
            "dropped_documents": {
                source: dict(sorted(reasons.items())) for source, reasons in sorted(self.dropped.items())
            },
        }


def _order(place: str) -> tuple[str, int]:
    """Files by name, their lines by number."""
    match = LINE.fullmatch(place)
    return (match[1], int(match[2])) if match else (place, 0)

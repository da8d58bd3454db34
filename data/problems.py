"""Bad rows and dropped documents: each counted by kind, the first of a kind named by file and line.

What is kept is the place and a fixed word for the reason, never a piece of the text, so that a card or a log
can be shown to anyone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data.documents import DataError

EXAMPLES = 5


@dataclass
class Problems:
    """What could not be used.

    strict: the first bad row raises instead of being skipped. rows: how many by kind. places: the first
    EXAMPLES of a kind. dropped: documents that cleaning, filters or deduplication left out, by source and
    reason.
    """

    strict: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def skip(self, kind: str, place: str, advice: str = "") -> None:
        """Count a bad row, as in skip("not JSON", "news.jsonl, line 3"). Raises DataError when strict."""
        if self.strict:
            raise DataError(f"{place}: {kind}" + (f"; {advice}" if advice else ""))
        self.rows[kind] = self.rows.get(kind, 0) + 1
        places = self.places.setdefault(kind, [])
        if len(places) < EXAMPLES:
            places.append(place)

    def drop(self, source: str, reason: str, count: int = 1) -> None:
        """Count documents of a source that are left out on purpose."""
        reasons = self.dropped.setdefault(source, {})
        reasons[reason] = reasons.get(reason, 0) + count

    def warnings(self) -> list[str]:
        """One sentence about bad rows, naming the first of the commonest kind; none when there are none."""
        if not self.rows:
            return []
        kinds = sorted(self.rows, key=lambda kind: (-self.rows[kind], kind))
        told = ", ".join(f"{self.rows[kind]} {kind}" for kind in kinds)
        return [
            f"bad rows were skipped: {told}; the first: {self.places[kinds[0]][0]}: {kinds[0]} "
            "(data_card.json names more, --strict stops at the first)"
        ]

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

"""How numbers, days and changes are written, and the choice among wordings."""

from __future__ import annotations

import hashlib
from datetime import date

from data.series import Unit

# The calendar module's names follow the user's locale; these never do.
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July")
MONTHS += ("August", "September", "October", "November", "December")


def month_of(day: date) -> str:
    """The month's name, as in March."""
    return MONTHS[day.month - 1]


def number(value: float) -> str:
    """Four or five significant digits, as prices are quoted: 1.1813, 23.45, 1,228.10, 11,497."""
    size = abs(value)
    if size >= 10000:
        return f"{value:,.0f}"
    return f"{value:,.2f}" if size >= 20 else f"{value:.4f}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, and none on zero: +1.2, -0.3, 0.0."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def day_words(day: date, *, weekday: bool = True) -> str:
    """As in Friday 9 January 2015."""
    text = f"{day.day} {month_of(day)} {day.year}"
    return f"{DAYS[day.weekday()]} {text}" if weekday else text


class Voice:
    """Chooses wordings for one note; the same key always makes the same choices."""

    def __init__(self, key: str) -> None:
        self._bits = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")

    def pick(self, *wordings: str) -> str:
        self._bits, choice = divmod(self._bits, len(wordings))
        return wordings[choice]

    def moved(self, change: float, unit: Unit) -> str:
        """As in "up 1.9 percent", or "little changed" when it rounds to nothing."""
        size = f"{abs(change) * 100:.1f}" if unit.change == "percent" else f"{abs(change):.2f}"
        if float(size) == 0:
            return self.pick("little changed", "almost unchanged", "flat")
        words = ("up", "higher by", "up by") if change > 0 else ("down", "lower by", "off")
        return f"{self.pick(*words)} {size} {unit.change}"

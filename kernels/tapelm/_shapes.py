"""Shapes of an op's tensors, written as in its documentation and checked before a Triton kernel runs.

``"*S N"`` has any number of leading sizes S and a last size N, ``"T D | B T D"`` is either of two, ``""`` a
scalar, a number stands for itself. A name has one value in all arguments of a call, and arguments with the
same text have one shape. The C++ kernels check theirs themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_PASSED = 256  # combinations of shapes that are known to be right, for each op


@dataclass(frozen=True, slots=True)
class _Shape:
    lead: str  # the name of the leading sizes; empty: there are none
    sizes: tuple[str | int, ...]

    def fits(self, shape: Sequence[int], known: dict[str | int, Any]) -> bool:
        """Whether ``shape`` is this one; learns the sizes whose names are not in ``known`` yet."""
        split = len(shape) - len(self.sizes)
        if split < 0 or (split and not self.lead):
            return False
        if self.lead and known.setdefault(self.lead, shape[:split]) != shape[:split]:
            return False
        for size, found in zip(self.sizes, shape[split:], strict=True):
            if (size if isinstance(size, int) else known.setdefault(size, found)) != found:
                return False
        return True

    def text(self, known: Mapping[str | int, Any]) -> str:
        lead = known.get(self.lead, [f"*{self.lead}"] if self.lead else [])
        sizes = [str(size) for size in (*lead, *(known.get(size, size) for size in self.sizes))]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _parse(text: str) -> _Shape:
    names = text.split()
    lead = names.pop(0)[1:] if names and names[0].startswith("*") else ""
    return _Shape(lead, tuple(int(name) if name.isdigit() else name for name in names))


def shape_check(
    op: str, function: Callable[..., Any], shapes: Mapping[str, str]
) -> Callable[[Sequence[Any]], None]:
    """A function that raises ValueError unless the arguments of ``function`` (...) have ``shapes``, by name.

    It takes the arguments in their order; those that are None have any shape.
    """
    names = list(inspect.signature(function).parameters)
    places = [names.index(name) for name in shapes]
    plan = [(name, text, [_parse(each) for each in text.split("|")]) for name, text in shapes.items()]
    passed: set[tuple[Any, ...]] = set()  # a training step asks for the same few again and again

    def check(arguments: Sequence[Any]) -> None:
        found = tuple([None if arguments[at] is None else arguments[at].shape for at in places])
        if found in passed:
            return
        known: dict[str | int, Any] = {}
        seen: dict[str, Sequence[int]] = {}
        for (name, text, allowed), shape in zip(plan, found, strict=True):
            if shape is None or shape == seen.get(text):
                continue
            if text in seen:
                wanted = str(tuple(seen[text]))
            elif any(each.fits(shape, known) for each in allowed):
                seen[text] = shape
                continue
            else:
                wanted = " or ".join(each.text(known) for each in allowed)
            raise ValueError(f"{op}: {name} is {tuple(shape)}; it must be {wanted}.")
        if len(passed) == MOST_PASSED:
            passed.clear()
        passed.add(found)

    return check

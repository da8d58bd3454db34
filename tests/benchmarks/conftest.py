"""A clock that only the timed functions move, so that times and ratios are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest


class Clock:
    """Stands in for the module `time`; every look at it takes a microsecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def taking(self, seconds: float, result: object = None) -> Callable[[], object]:
        """A function that takes so long and gives `result`."""

        def run() -> object:
            self.now += seconds
            return result

        return run


@pytest.fixture(autouse=True)
def everything_on_one_thread(one_thread):
    """In every test here."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for module in ("ceilings", "harness"):
        monkeypatch.setattr(f"benchmarks.{module}.time", found)
    # The ceilings are run for real; small arrays keep that short.
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 10)
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SHAPES", ((8, 8, 8), (4, 8, 16)))
    return found

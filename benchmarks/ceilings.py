"""What the machine can do at most, measured between the things it is compared with.

A round times every limit once, so that all rows of a dtype are held against the same figure. The GEMM peak is
the best of a few shapes' medians, square and as models have them, of PyTorch and of our own product; the copy
limit is the best one of a copy, a triad and, on CPUs, a copy of ours. On a GPU the limits run as captured
graphs, so that launches cost nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import tapelm
from gpt.hardware import synchronize

GEMM_SHAPES = ((1024, 1024, 1024), (2048, 512, 2048), (2048, 2048, 512))  # rows, inner, columns
CUDA_GEMM_SHAPES = ((4096, 4096, 4096), (8192, 4096, 8192), (8192, 8192, 8192))
"""Smaller ones give a hundred multiprocessors too few tiles each to reach their rate."""
ARRAY_BYTES = 1 << 27
COPIES, PRODUCTS = 10, 3
"""Calls in a captured graph; a product of CUDA_GEMM_SHAPES takes longer than a copy."""
HOPELESS = 0.4
"""A probe at this part of the best one's rate is not timed again; noise alone halves a rate."""


@dataclass(frozen=True)
class Limit:
    """Flops or bytes per second, and what they were measured with."""

    rate: float
    label: str


@dataclass
class Probe:
    """One function at the machine's limit: `work` flops or bytes in each call."""

    name: str
    run: Callable[[], Any]
    work: float
    seconds: list[float]
    captured: Callable[[], Any] | None = None
    """What a graph replays. It holds the tensors, whose memory the graph itself does not keep."""


class Ceilings:
    """The limits of one run. `round()` times each of them once; `gemm` and `copy` are of the rounds so far.

    `bounds` and `dtypes` choose what is timed: "gemm" in every dtype, "copy" once.
    """

    def __init__(
        self, device: torch.device, dtypes: Iterable[torch.dtype], bounds: Sequence[str] = ("gemm", "copy")
    ) -> None:
        self.device = device
        self.probes: dict[str, list[Probe]] = {}
        shapes = CUDA_GEMM_SHAPES if device.type == "cuda" else GEMM_SHAPES
        if "gemm" in bounds:
            for dtype in dict.fromkeys(dtypes):
                self.probes[f"gemm {dtype}"] = [
                    probe for shape in shapes for probe in self._gemm(dtype, *shape)
                ]
        if "copy" in bounds:
            self.probes["copy"] = self._bandwidth()
        for probe in self._all():
            probe.run()
        self.probes = {key: self._contenders(probes) for key, probes in self.probes.items()}

    def round(self) -> None:
        for probe in self._all():
            probe.seconds.append(timed(probe.run, self.device))

    def forget(self) -> None:
        """The rounds so far, except for the last one."""
        for probe in self._all():
            del probe.seconds[:-1]

    def limit(self, bound: str, dtype: torch.dtype) -> Limit:
        """Of the bound of a case, "gemm" or "copy"."""
        return self.gemm(dtype) if bound == "gemm" else self.copy()

    def gemm(self, dtype: torch.dtype) -> Limit:
        rate, name = max(_rates(self.probes[f"gemm {dtype}"]))
        return Limit(rate, f"{rate / 1e9:.0f} GFLOP/s GEMM {name}")

    def copy(self) -> Limit:
        rate, name = max(_rates(self.probes["copy"]))
        return Limit(rate, f"{rate / 1e9:.0f} GB/s {name}")

    def as_json(self) -> dict[str, dict[str, float]]:
        """Flops or bytes per second of every probe that was timed."""
        return {key: {name: rate for rate, name in _rates(probes)} for key, probes in self.probes.items()}

    def _all(self) -> Iterable[Probe]:
        return [probe for probes in self.probes.values() for probe in probes]

    def _contenders(self, probes: list[Probe]) -> list[Probe]:
        """Those that may be the limit: some use a fraction of the CPU and would take most of a round."""
        rates = [probe.work / min(timed(probe.run, self.device) for _ in range(2)) for probe in probes]
        return [probe for probe, rate in zip(probes, rates, strict=True) if rate > HOPELESS * max(rates)]

    def _gemm(self, dtype: torch.dtype, rows: int, inner: int, columns: int) -> list[Probe]:
        """PyTorch's product, and on CPUs ours: MKL does not use all of every CPU."""
        a = torch.randn(rows, inner, device=self.device).to(dtype)
        b = torch.randn(inner, columns, device=self.device).to(dtype)
        out = torch.empty(rows, columns, device=self.device, dtype=dtype)
        name, work = f"{rows}x{inner}x{columns}", 2.0 * rows * inner * columns
        probes = [self._probe(name, lambda: torch.mm(a, b, out=out), work, PRODUCTS)]
        if self.device.type == "cpu":
            weight = b.t().contiguous()
            probes.append(self._probe(f"{name} (ours)", lambda: tapelm.linear(a, weight), work, PRODUCTS))
        return probes

    def _bandwidth(self) -> list[Probe]:
        """PyTorch's, and on CPUs ours, which writes past the caches: the rows of a table, each once."""
        a, b, c = (torch.zeros(ARRAY_BYTES // 4, device=self.device) for _ in range(3))
        probes = [
            self._probe("copy", lambda: a.copy_(b), 2.0 * ARRAY_BYTES, COPIES),
            self._probe("triad", lambda: torch.add(b, c, alpha=3.0, out=a), 3.0 * ARRAY_BYTES, COPIES),
        ]
        if self.device.type == "cpu":
            width = min(4096, len(a))
            table, zeros = a.view(-1, width), torch.zeros(1, width)
            ids = torch.arange(len(table))[:, None]
            ours = partial(tapelm.embedding, ids, table, zeros)
            probes.append(self._probe("copy (ours)", ours, 2.0 * ARRAY_BYTES, COPIES))
        return probes

    def _probe(self, name: str, run: Callable[[], Any], work: float, calls: int) -> Probe:
        if self.device.type != "cuda":
            return Probe(name, run, work, [])
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return Probe(name, graph.replay, calls * work, [], captured=run)


def _rates(probes: list[Probe]) -> list[tuple[float, str]]:
    return [(probe.work / statistics.median(probe.seconds), probe.name) for probe in probes]


def timed(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the mean of `calls`: on a GPU between two events, else by the clock."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(device)
        first.record()
        for _ in range(calls):
            function()
        last.record()
        synchronize(device)
        return first.elapsed_time(last) / 1e3 / calls
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls

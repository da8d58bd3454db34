"""Cost of a step over batch, sequence, width, depth, vocabulary and threads, and the planner's fit.

All shapes are timed in interleaved rounds. An exponent is the slope of log(seconds) over log(size), and its
error how far the times are from a power, or the rounds from one another where that is more. The planner is
fitted to the curves' points and tested on HELD_OUT, which differ from them in everything at once.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import planner
from benchmarks.ceilings import Ceilings, timed
from benchmarks.harness import LEAST_ROUNDS, Row, make_row, relative_error
from benchmarks.planner import Point
from benchmarks.train import Step
from gpt.config import ModelConfig
from gpt.hardware import set_threads
from tapelm.roofline import Device

Shape = dict[str, int]
BASE: Shape = {
    "batch_size": 4, "block_size": 256, "n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 4096,
}  # fmt: skip
CURVES: dict[str, tuple[int, ...]] = {
    "batch_size": (2, 4, 8, 16),
    "block_size": (128, 256, 512, 1024),
    "n_embd": (128, 256, 512),
    "n_layer": (1, 2, 4),
    "vocab_size": (1024, 4096, 16384),
}
HELD_OUT: tuple[Shape, ...] = (
    {"batch_size": 6, "block_size": 192, "n_embd": 384, "n_layer": 3, "n_head": 6, "vocab_size": 8192},
    {"batch_size": 3, "block_size": 512, "n_embd": 320, "n_layer": 4, "n_head": 5, "vocab_size": 2048},
    {"batch_size": 12, "block_size": 128, "n_embd": 192, "n_layer": 6, "n_head": 3, "vocab_size": 12288},
    {"batch_size": 4, "block_size": 256, "n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 10000},
)
WARM_UP = 2
ERROR = "the larger of two standard errors: how far times lie from a power of the size, and rounds apart"


def name_of(shape: Shape) -> str:
    return "x".join(str(shape[key]) for key in BASE)


def shapes() -> dict[str, list[Shape]]:
    """By curve; every curve goes through BASE, with heads of 64 where the width changes."""
    return {
        key: [
            {**BASE, key: size, **({"n_head": max(1, size // 64)} if key == "n_embd" else {})}
            for size in sizes
        ]
        for key, sizes in CURVES.items()
    }


def _shapes_without(left_out: str) -> list[Shape]:
    """Those of all curves but one."""
    curves = [curve for key, curve in shapes().items() if key != left_out]
    return list({name_of(shape): shape for curve in curves for shape in curve}.values())


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(sizes) by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    above = math.fsum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / math.fsum((a - x_mean) ** 2 for a in x)


def power(sizes: Sequence[float], rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The median of the rounds' exponents, which what slows a whole round is not in, and its standard error.

    See ERROR. For relative_error a round's exponent is the ratio of times that it makes of the whole range.
    """
    found = [exponent(sizes, seconds) for seconds in zip(*rounds, strict=True)]
    middle = statistics.median(found)
    x = [math.log(size) for size in sizes]
    off = [math.log(statistics.median(own)) - middle * a for a, own in zip(x, rounds, strict=True)]
    spread, misfit = (sum((a - statistics.fmean(each)) ** 2 for a in each) for each in (x, off))
    of_fit = math.sqrt(misfit / max(1, len(x) - 2) / spread)
    span = max(sizes) / min(sizes)
    return middle, max(of_fit, relative_error([span**each for each in found]) / math.log(span))


def tracked(work: Sequence[Any], description: str) -> Iterable[Any]:
    """With a bar that is drawn between what is timed, not meanwhile."""
    return track(work, description, console=Console(stderr=True), transient=True, auto_refresh=False)


def build(shape: Shape, device: torch.device) -> Step:
    rest = {key: value for key, value in shape.items() if key != "batch_size"}
    return Step("demo", "optimized", shape["batch_size"], device, sizes=rest)


def measure(device: torch.device, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows of all shapes and threads, and the section "plan" of the JSON."""
    wanted = {name_of(shape): shape for curve in shapes().values() for shape in curve}
    wanted |= {name_of(shape): shape for shape in HELD_OUT}
    steps: dict[str, Step] = {}
    for name, shape in tracked(list(wanted.items()), "warming up"):
        steps[name] = build(shape, device)
        for _ in range(WARM_UP):
            steps[name]()
    dtype = next(iter(steps.values())).dtype
    ceilings = Ceilings(device, [dtype])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    last = list(steps)[-1]
    for name, step in tracked(list(steps.items()) * rounds, "all shapes"):
        seconds[name].append(timed(step, device))
        if name == last:
            ceilings.round()
    limit = ceilings.gemm(dtype)
    base = name_of(BASE)
    rows = [
        make_row(
            "scaling", name, step.shape, dtype, device, seconds[name], limit, step.flops,
            against={base: seconds[base]},
        )
        for name, step in steps.items()
    ]  # fmt: skip
    rates = Device("here", ceilings.copy().rate, limit.rate, limit.rate)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fitted_on = [_point(shape, medians, rates) for shape in wanted.values() if shape not in HELD_OUT]
    tested_on = [_point(shape, medians, rates) for shape in HELD_OUT]
    multiples = planner.fit(fitted_on)
    without = {
        key: planner.fit([_point(shape, medians, rates) for shape in _shapes_without(key)]) for key in CURVES
    }
    steps.clear()
    gc.collect()
    powers = {
        key: power(CURVES[key], [seconds[name_of(shape)] for shape in curve])
        for key, curve in shapes().items()
    }
    threads, of_threads = _threads(device, rounds)
    powers |= of_threads
    section = {
        "multiples": dict(zip(planner.PARTS, multiples, strict=True)),
        "multiples_without": {
            key: dict(zip(planner.PARTS, fit, strict=True)) for key, fit in without.items()
        },
        "exponents": {key: found for key, (found, _) in powers.items()},
        "exponent_errors": {key: error for key, (_, error) in powers.items() if rounds >= LEAST_ROUNDS},
        "fit_errors": planner.errors(fitted_on, multiples),
        "held_out_errors": dict(
            zip(map(name_of, HELD_OUT), planner.errors(tested_on, multiples), strict=True)
        ),
    }
    report(section)
    return rows + threads, section


def _point(shape: Shape, medians: dict[str, float], rates: Device) -> Point:
    sizes = {key: value for key, value in shape.items() if key != "batch_size"}
    return Point(ModelConfig(**sizes, dropout=0.0), shape["batch_size"], medians[name_of(shape)], rates)


def _threads(device: torch.device, rounds: int) -> tuple[list[Row], dict[str, tuple[float, float]]]:
    """The base shape with 1, 2, 4, ... threads up to those in use, and the exponent; none on a GPU."""
    most = torch.get_num_threads()
    counts = [2**power for power in range(int(math.log2(most)) + 1)] if device.type == "cpu" else []
    if len(counts) < 2:
        return [], {}
    step = build(BASE, device)
    ceilings = Ceilings(device, [step.dtype], ["gemm"])
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for number in tracked(range(rounds + 1), "threads"):
        for count in counts:
            set_threads(count)
            taken = timed(step, device)
            if number:
                seconds[count].append(taken)
        set_threads(most)
        ceilings.round()
    rows = [
        make_row(
            "scaling threads", f"{count} threads", step.shape, step.dtype, device, times,
            ceilings.gemm(step.dtype), step.flops, against={"1 threads": seconds[1]},
        )
        for count, times in seconds.items()
    ]  # fmt: skip
    return rows, {"threads": power(counts, list(seconds.values()))}


def report(section: dict[str, Any]) -> None:
    errors = section["exponent_errors"]
    for key, value in section["exponents"].items():
        known = f" ±{errors[key]:.2f}" if key in errors else ""
        print(f"a step's time goes with {key} to the power {value:.2f}{known}")
    print(f"± is {ERROR}" if errors else f"fewer than {LEAST_ROUNDS} rounds do not tell how well it is known")
    multiples = ", ".join(f"{name} {value:.2f}" for name, value in section["multiples"].items())
    print(f"the planner's multiples of the roofline: {multiples}")
    for name, error in section["held_out_errors"].items():
        print(f"held out {name}: predicted {100 * error:+.0f}%")

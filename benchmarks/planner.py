"""Step time, memory and cost of a training before it is run, from the roofline.

A step is four parts, each a time at the ceiling: products with weights, attention, activations moved, and
parameters moved by the optimizer. What a part really takes is a multiple of that; the multiples are fitted to
measured steps (`python -m benchmarks scaling`) and tested on shapes that were not among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compare import RESULTS, Results, read
from benchmarks.train import VOCAB_SIZE, settings
from gpt.cli import UserError
from gpt.config import PRESETS, ModelConfig
from tapelm.linear_cross_entropy import CHUNK_ELEMENTS
from tapelm.roofline import DEVICES, Device

PARTS = ("products", "attention", "activations", "parameters", "constant")
TRUSTED = 0.25
"""Error on held-out shapes above which a measurement was disturbed."""
LEAST = (1.0, 1.0, 1.0, 1.0, 0.0)
"""Of a part's multiple: nothing is faster than its ceiling."""
OPTIMIZER_BYTES = 30
"""Moved for each parameter: gradient twice, moments and master read and written, the bf16 copy written."""
STATE_BYTES = 16
"""Kept for each parameter: bf16 weight and gradient, float32 master and two moments."""
ACTIVATIONS = 34
"""Numbers of width C that a block writes and later reads for each token, forward and backward."""
GPUS = {
    "A100": "sm_80",
    "A10G": "sm_86",
    "L40S": "sm_89",
    "H100": "sm_90",
    "B200": "sm_100",
    "MI300X": "gfx942",
}
ROOM = 0.9
"""Of a GPU's memory: contexts, other temporaries and what an allocator cannot use take the rest."""
NODE = 8
LINKS = {"A100": 300e9, "H100": 450e9, "B200": 900e9, "MI300X": 448e9}
"""Bytes per second of a GPU to the others of its node, one direction; others are on PCIe 4.0 x16."""
PCIE, NETWORK = 32e9, 50e9
"""Bytes per second of PCIe 4.0 x16, and of a 400 Gbit/s adapter for each GPU between nodes."""


@dataclass(frozen=True)
class Point:
    """A measured step: its shape, seconds, and the rates of the run it was measured in."""

    model: ModelConfig
    batch_size: int
    seconds: float
    rates: Device


def parameters(model: ModelConfig) -> int:
    C, L = model.n_embd, model.n_layer
    return L * (12 * C * C + 13 * C) + (2 * model.vocab_size + model.block_size + 2) * C


def parts(model: ModelConfig, batch_size: int, rates: Device) -> list[float]:
    """Seconds of each of PARTS at the ceilings of `rates`; the constant is one unit, a millisecond."""
    tokens = batch_size * model.block_size
    attention = 6.0 * model.n_layer * model.block_size * model.n_embd * tokens
    products = model.flops_per_token() * tokens - attention
    moved = 2.0 * tokens * (ACTIVATIONS * model.n_layer * model.n_embd + 3 * model.vocab_size)
    return [
        products / rates.half_flops,
        attention / rates.half_flops,
        moved / rates.bandwidth,
        OPTIMIZER_BYTES * parameters(model) / rates.bandwidth,
        1e-3,
    ]


def fit(points: Sequence[Point]) -> list[float]:
    """Multiples of PARTS, none below LEAST, with the least squares of relative errors.

    A part that comes out below is held there and the rest fitted again.
    """
    rows = [[part / p.seconds for part in parts(p.model, p.batch_size, p.rates)] for p in points]
    left = [1.0 - math.fsum(least * part for least, part in zip(LEAST, row, strict=True)) for row in rows]
    kept = list(range(len(PARTS)))
    while kept:
        system = torch.tensor([[row[i] for i in kept] for row in rows], dtype=torch.float64)
        aim = torch.tensor(left, dtype=torch.float64)[:, None]
        values = torch.linalg.lstsq(system, aim, driver="gelsd").solution.flatten().tolist()
        if min(values) >= 0:
            more = dict(zip(kept, values, strict=True))
            return [least + more.get(i, 0.0) for i, least in enumerate(LEAST)]
        kept.remove(kept[values.index(min(values))])
    return list(LEAST)


def predict(model: ModelConfig, batch_size: int, rates: Device, multiples: Sequence[float]) -> float:
    """Seconds of a step on one device."""
    return math.fsum(m * part for m, part in zip(multiples, parts(model, batch_size, rates), strict=True))


def errors(points: Sequence[Point], multiples: Sequence[float]) -> list[float]:
    """Predicted over measured, minus 1, of each point."""
    return [predict(p.model, p.batch_size, p.rates, multiples) / p.seconds - 1 for p in points]


def memory_bytes(model: ModelConfig, batch_size: int) -> float:
    """Parameters with optimizer state, what a forward pass keeps for the backward one in bf16, and what the
    loss takes meanwhile: the gradient of the head, summed in float32, its bf16 copy and a chunk of logits."""
    tokens = batch_size * model.block_size
    kept = 2.0 * tokens * (14 * model.n_layer * model.n_embd + 2 * model.n_embd)
    head = 6.0 * model.vocab_size * model.n_embd + 2.0 * CHUNK_ELEMENTS
    return STATE_BYTES * parameters(model) + kept + head


def all_reduce_seconds(model: ModelConfig, gpu: str, gpus: int) -> float:
    """Of bf16 gradients over a ring, not hidden behind the backward pass: the slowest link decides."""
    if gpus == 1:
        return 0.0
    link = NETWORK if gpus > NODE else LINKS.get(gpu, PCIE)
    return 2.0 * (gpus - 1) / gpus * 2 * parameters(model) / link


@dataclass(frozen=True)
class Plan:
    """Of one optimizer step, of `passes` forward and backward; `tokens` are those of all GPUs."""

    floor_seconds: float
    seconds: float
    memory: float
    state: float
    """Of the memory, what does not go with the batch."""
    tokens: int
    passes: int


def plan(preset: str, batch_size: int, gpu: str, gpus: int, multiples: Sequence[float]) -> Plan:
    """Raises UserError for an unknown preset or GPU."""
    if gpu not in GPUS:
        raise UserError(f"unknown --gpu {gpu!r}; choose one of: {', '.join(GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {gpus}")
    config = settings(preset, batch_size)
    model, rates = config.model(config.vocab_size or VOCAB_SIZE), DEVICES[GPUS[gpu]]
    passes, exchanged = config.accumulation_steps, all_reduce_seconds(model, gpu, gpus)
    # Only the gradient's passes are repeated, the optimizer's is one.
    once = [*parts(model, batch_size, rates)]
    work = [part if name == "parameters" else passes * part for name, part in zip(PARTS, once, strict=True)]
    work[PARTS.index("constant")] = 0.0
    floor = math.fsum(work)
    seconds = math.fsum(m * part for m, part in zip(multiples, work, strict=True))
    tokens = gpus * passes * batch_size * model.block_size
    memory, state = memory_bytes(model, batch_size), memory_bytes(model, 0)
    return Plan(floor + exchanged, max(floor, seconds) + exchanged, memory, state, tokens, passes)


def too_large(found: Plan, batch_size: int, gpu: str) -> str:
    """Why the memory of a plan is not there, and what would change that; "" where it fits."""
    room, activations = DEVICES[GPUS[gpu]].memory, found.memory - found.state
    usable = ROOM * room
    if found.memory <= usable:
        return ""
    largest = int((usable - found.state) / activations * batch_size)
    return (
        f"Does not fit: {gpu} has {room / 1e9:.0f} GB (datasheet), a tenth of which is left for what is not "
        "in this plan, and more GPUs do not help, as each holds all of this. Parameters, gradients, "
        f"optimizer and loss take {found.state / 1e9:.1f} GB, activations {activations / 1e9:.1f}: "
        + (f"--batch-size {largest} is the most that fits" if largest > 0 else "no batch fits")
        + ". Activation checkpointing keeps fewer activations for more time; this plan is without."
    )


def fitted(path: Path | None) -> tuple[list[list[float]], dict[str, Any], Results]:
    """Multiples of all points and without each curve, the section "plan", and the results they are from.

    path: a file of `benchmarks scaling`, None for the newest committed one.
    """
    files = sorted(RESULTS.glob("*scaling*.json")) if path is None else [path]
    if not files:
        raise UserError(f"no measured steps in {RESULTS}: name a file of python -m benchmarks scaling --json")
    found = (read(file, "scaling") for file in files)
    newest = max(found, key=lambda results: results.machine.get("date", ""))
    try:
        section = newest.content["plan"]
        fits = [section["multiples"], *section["multiples_without"].values()]
        return [[fit[name] for name in PARTS] for fit in fits], section, newest
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{newest.path} holds no plan: give a file that python -m benchmarks scaling --json FILE wrote"
        ) from error


def run(
    path: Path | None,
    preset: str,
    batch_size: int | None,
    gpu: str,
    gpus: int,
    dollars: float | None,
    tokens: float,
) -> int:
    """`benchmarks plan`: prints the plan, with what its figures are worth."""
    if batch_size is not None and batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    if not 0 < tokens < math.inf:
        raise UserError(f"--tokens must be a number above 0, got {tokens:g}")
    if dollars is not None and not 0 <= dollars < math.inf:
        raise UserError(f"--dollars must be a number of at least 0, got {dollars:g}")
    fits, section, source = fitted(path)
    settings(preset, 1)  # refuses an unknown preset
    size = batch_size or PRESETS[preset].get("batch_size", 16)
    gpu = gpu.upper()
    plans = [plan(preset, size, gpu, gpus, multiples) for multiples in fits]
    found, took = plans[0], sorted(each.seconds for each in plans)
    table = Table(title=f"{preset} on {gpus} x {gpu}, {size} windows a pass and GPU, {found.passes} a step")
    for column in ("", "at the ceiling", "as measured steps were"):
        table.add_column(column, justify="right" if column else "left")

    def add(name: str, unit: str, of_seconds: Callable[[float], float]) -> None:
        low, high = sorted((of_seconds(took[0]), of_seconds(took[-1])))
        table.add_row(
            name, unit.format(of_seconds(found.floor_seconds)), f"{unit.format(low)} to {unit.format(high)}"
        )

    long = found.floor_seconds >= 10
    add("optimizer step", "{:,.1f} s" if long else "{:,.1f} ms", lambda s: s if long else 1e3 * s)
    add("tokens/s", "{:,.0f}", lambda s: found.tokens / s)
    brief = tokens / found.tokens * found.floor_seconds < 3600
    add(
        f"{tokens:.2g} tokens",
        "{:.2f} min" if brief else "{:,.2f} h",
        lambda s: tokens / found.tokens * s / (60 if brief else 3600),
    )
    if dollars is not None:
        add(
            f"at ${dollars:g} a GPU hour",
            "${:,.0f}",
            lambda s: tokens / found.tokens * s / 3600 * gpus * dollars,
        )
    warning = too_large(found, size, gpu)
    table.add_row(
        "memory of a GPU", *2 * [f"{found.memory / 1e9:,.1f} GB" + (", does not fit" if warning else "")]
    )
    Console(width=None if Console().is_terminal else 110).print(table)
    worst = max(map(abs, section["held_out_errors"].values()))
    if warning:
        print(warning)
    if worst > TRUSTED:
        print(
            f"Hardly worth using: {source.path.name} is of a busy machine, measure it again on a quiet one."
        )
    print(
        f"Multiples of the roofline from {source.path.name}: steps on {source.machine.get('device')}, of "
        f"shapes it was not fitted to, were predicted within {100 * worst:.0f}%. That says nothing of a GPU, "
        "on which no step has been measured: the last column supposes that our kernels come as near to the "
        f"{gpu}'s ceilings (datasheet) as to that machine's, and has the range of the fits without one or "
        "another curve of shapes. Gradients are exchanged without overlap."
    )
    return 0

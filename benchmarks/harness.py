"""Timing by interleaved rounds: A B, B A, ..., ceilings beside them; what counts are medians and ratios.

A shared machine drifts by factors within minutes, so that only times taken in turn can be compared. The order
within a round is another one each time, as what runs before leaves its mark in caches and memory.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.ceilings import Ceilings, Limit, timed
from benchmarks.elsewhere import unmuted
from benchmarks.kept_memory import TUNABLES
from gpt.cli import UserError, write_atomically
from gpt.hardware import device_name, fingerprint, native_bf16

ROUNDS = 9
LEAST_ROUNDS, ROUNDS_SECONDS = 3, 36.0
"""Where nobody says how many rounds: no further one begins after so many seconds, see interleave."""
LEAST_SECONDS, MOST_CALLS = 2e-3, 50
"""A variant is called so often in a round that what ran before it does not matter."""
FEW_VALUES = {3: 1.495, 4: 1.363, 5: 1.206, 6: 1.2, 7: 1.14, 8: 1.129, 9: 1.107}
"""What the median absolute deviation of so many values is multiplied with; see relative_error."""
SETTLED = 0.01
MOST_TIMES_ROUNDS, MOST_SECONDS = 6, 1.0
"""While a ratio's standard error is above SETTLED, a short case takes its rounds again and again."""


@dataclass(frozen=True)
class Case:
    """One shape of one subject with the variants that are timed in turn, the first being the baseline.

    `work` is what the maths needs at the least: flops when `bound` is "gemm", bytes when it is "copy".
    A variant returns its results; `agree` compares them with the baseline's before anything is timed.
    """

    subject: str
    shape: str
    dtype: torch.dtype
    variants: dict[str, Callable[[], Any]]
    bound: str
    work: float
    agree: Callable[[Any, Any], None]


@dataclass
class Row:
    """One line of the table and one object of the JSON."""

    subject: str
    variant: str
    shape: str
    dtype: str
    device: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio_vs: dict[str, float]
    ceiling: str
    fraction_of_ceiling: float
    extra: dict[str, float] = field(default_factory=dict)


Seconds = dict[str, list[float]]
"""Of every variant in every round."""


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class WrongResult(UserError):
    """A variant that does not compute what its baseline does; nothing of its case was timed."""


def check(case: Case) -> tuple[Case, dict[str, str]]:
    """Run every variant once and compare it with the baseline: the case of those that run, others' errors.

    Without its baseline a case has no variants left. Raises WrongResult on the first bad result.
    """
    errors: dict[str, str] = {}
    baseline, *others = case.variants
    try:
        expected = case.variants[baseline]()
    except Exception as error:
        return replace(case, variants={}), {baseline: reason(error)}
    for name in others:
        try:
            case.agree(case.variants[name](), expected)
        except AssertionError as error:
            raise WrongResult(f"{case.subject} {case.shape}, {name}: {error}") from error
        except Exception as error:
            errors[name] = reason(error)
    return replace(case, variants={k: v for k, v in case.variants.items() if k not in errors}), errors


def is_ours(variant: str) -> bool:
    return variant.startswith("tapelm")


def measure(case: Case, device: torch.device, rounds: int = ROUNDS) -> list[Row]:
    """Check that the variants agree, then time them in rounds, with the ceiling; see take.

    A peer that does not run here is left out with a word. Raises WrongResult where ours does not.
    """
    case, errors = check(case)
    for name, error in errors.items():
        said = f"{case.subject} {case.shape}, {name}: {error}"
        if is_ours(name):
            raise WrongResult(said)
        print(f"skipped: {said}")
    if not case.variants:
        return []
    ceilings = Ceilings(device, [case.dtype], [case.bound])
    seconds, limit = take(case, rounds, ceilings, lambda: calls_in_a_round(case, device))
    baseline = next(iter(seconds))
    return [
        make_row(
            case.subject, name, case.shape, case.dtype, device, times, limit, case.work,
            against={baseline: seconds[baseline]},
        )
        for name, times in seconds.items()
    ]  # fmt: skip


def calls_in_a_round(case: Case, device: torch.device) -> dict[str, int]:
    """By one call of each, which serves as a warm-up."""
    return {
        name: min(MOST_CALLS, math.ceil(LEAST_SECONDS / timed(run, device)))
        for name, run in case.variants.items()
    }


def take(
    case: Case, rounds: int, ceilings: Ceilings, warm_up: Callable[[], Mapping[str, int]],
    most_seconds: float = MOST_SECONDS, turn: int = 0,
) -> tuple[Seconds, Limit]:  # fmt: skip
    """Time the variants in turn, and the ceiling before and behind them.

    `warm_up` calls every variant and says how often each is called in a round. The rounds are taken again
    while a ratio is not known to SETTLED and the calls, each counted once a round, took less than
    `most_seconds`. `ceilings` have this case's bound and dtype; of what was timed with earlier cases the last
    round counts, mostly the one right before this case. Another `turn` has the variants in other orders.
    """
    ceilings.forget()
    # Not in the rounds: they leave caches cold, which small ops feel.
    for _ in range(rounds // 2):
        ceilings.round()
    calls, generator = warm_up(), random.Random(turn)
    again = partial(interleave, case.variants, ceilings, rounds, calls, limits=False, generator=generator)
    seconds, baseline = again(), next(iter(case.variants))
    most = MOST_TIMES_ROUNDS * max(rounds, 2)
    while len(seconds[baseline]) < most and not _settled(seconds, baseline, most_seconds):
        for name, times in again().items():
            seconds[name] += times
    for _ in range(rounds - rounds // 2):
        ceilings.round()
    return seconds, ceilings.limit(case.bound, case.dtype)


def in_fresh_process(function: Callable[..., Any], *arguments: Any, modules: Sequence[str] = ()) -> Any:
    """What a picklable function gives in a process that has imported its module and `modules`, no more.

    It is forked from one that only imports, as importing takes longer than most of what is timed here. There
    is one such process: modules and environment are those of the first call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", function.__module__, *modules])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(unmuted, function, *arguments).result()


def _settled(seconds: Seconds, baseline: str, most_seconds: float = MOST_SECONDS) -> bool:
    """Whether all ratios are known to SETTLED, or more rounds would take too long."""
    if sum(map(sum, seconds.values())) > most_seconds:
        return True
    ratios = [
        [base / own for base, own in zip(seconds[baseline], times, strict=True)]
        for name, times in seconds.items()
        if name != baseline
    ]
    return all(relative_error(each) < SETTLED for each in ratios)


def interleave(
    variants: Mapping[str, Callable[[], Any]],
    ceilings: Ceilings,
    rounds: int | None,
    calls: Mapping[str, int] | None = None,
    *,
    limits: bool = True,
    generator: random.Random | None = None,
    parts: int = 1,
) -> Seconds:
    """Seconds of every variant in every round, of one or `calls` calls; a round ends with the ceilings.

    Of two rounds the first has the variants in any order, the second in reverse.

    rounds: None takes those that begin within ROUNDS_SECONDS, from LEAST_ROUNDS to ROUNDS.
    limits: whether the ceilings are timed.
    parts: of how many parts of all rounds this is one.
    """
    seconds: Seconds = {name: [] for name in variants}
    order, generator = list(variants), generator or random.Random(0)
    started = time.perf_counter()
    for done in range(math.ceil((ROUNDS if rounds is None else rounds) / parts)):
        passed = parts * (time.perf_counter() - started)
        if rounds is None and parts * done >= LEAST_ROUNDS and passed > ROUNDS_SECONDS:
            break
        if done % 2:
            order.reverse()
        else:
            generator.shuffle(order)
        for name in order:
            seconds[name].append(timed(variants[name], ceilings.device, calls[name] if calls else 1))
        if limits:
            ceilings.round()
    return seconds


def make_row(
    subject: str, variant: str, shape: str, dtype: torch.dtype, device: torch.device,
    seconds: Sequence[float], limit: Limit, work: float, *, against: Mapping[str, Sequence[float]],
) -> Row:  # fmt: skip
    """A Row from the seconds of its rounds; `against` has those of the variants it is compared with.

    A ratio is the median of the ratios of each round, and `ratio_error` the standard error of the first one,
    relative: 1.2533 times that of a mean, the spread taken from the median absolute deviation.
    """
    median = statistics.median(seconds)
    ratios = {
        name: [base / own for base, own in zip(times, seconds, strict=True)]
        for name, times in against.items()
    }
    return Row(
        subject=subject,
        variant=variant,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        device=device_name(device),
        median_ms=1e3 * median,
        fastest_ms=1e3 * min(seconds),
        slowest_ms=1e3 * max(seconds),
        ratio_vs={name: statistics.median(each) for name, each in ratios.items()},
        ceiling=limit.label,
        fraction_of_ceiling=work / median / limit.rate,
        extra={"ratio_error": relative_error(next(iter(ratios.values())))},
    )


def relative_error(ratios: Sequence[float]) -> float:
    """Standard error of the median of `ratios` over that median; see make_row.

    The median absolute deviation of few values is too small, by factors that Croux and Rousseeuw (1992) give.
    Fewer than LEAST_ROUNDS have no spread to speak of: they are taken to be known to a tenth.
    """
    count, middle = len(ratios), statistics.median(ratios)
    if count < LEAST_ROUNDS:
        return 0.1
    few = FEW_VALUES.get(count, count / (count - 0.8))
    deviation = 1.4826 * few * statistics.median([abs(ratio - middle) for ratio in ratios])
    return 1.2533 * deviation / middle / len(ratios) ** 0.5


def close(rtol: float, atol: float) -> Callable[[Any, Any], None]:
    """Compares the tensors of two results in float32."""

    def agree(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
            torch.testing.assert_close(
                a.float(),
                b.float(),
                rtol=rtol,
                atol=atol,
                msg=lambda text, i=index: f"result {i} is wrong, nothing was timed: {text}",
            )

    return agree


def agree_in_float32(
    dtype: torch.dtype, plain: Callable[[torch.dtype], Sequence[Tensor]], rows: int
) -> Callable[[Any, Any], None]:
    """`close` for results in `dtype`, of which some are sums over `rows` standard normal numbers.

    In bfloat16 PyTorch adds some of them up in bfloat16, a few percent off for thousands of rows; ours are
    held to 1% of such a sum in float32, which `plain` gives.
    """
    if dtype == torch.float32:
        return close(1e-4, 1e-3)

    def agree(ours: Sequence[Tensor], _: Sequence[Tensor]) -> None:
        close(0.05, max(0.05, 0.01 * rows**0.5))(ours, plain(torch.float32))

    return agree


def report(title: str, rows: Sequence[Row], device: torch.device) -> None:
    """Print the table, what cannot be, and the machine."""
    console = Console(width=None if Console().is_terminal else 150)
    if rows:
        console.print(row_table(title, rows))
    for row in impossible(rows):
        console.print(
            f"! {row.subject} {row.shape}, {row.variant}: {row.fraction_of_ceiling:.0%} of its ceiling; "
            "its data lie in a cache, or the machine was busy when the ceiling was measured"
        )
    console.print(stamp(fingerprint(device)), highlight=False)


def row_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title)
    columns = ("op", "shape", "dtype", "variant", "median ms", "min-max", "speed-up", "of ceiling", "ceiling")
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("op", "shape", "variant", "ceiling") else "right"
        )
    for row in rows:
        table.add_row(
            row.subject,
            row.shape,
            row.dtype,
            row.variant,
            f"{row.median_ms:.2f}",
            f"{row.fastest_ms:.2f}-{row.slowest_ms:.2f}",
            f"{next(iter(row.ratio_vs.values())):.2f}x",
            f"{100 * row.fraction_of_ceiling:.0f}%" + ("!" if row.fraction_of_ceiling > 1 else ""),
            row.ceiling,
        )
    return table


def impossible(rows: Sequence[Row]) -> list[Row]:
    """Rows above their ceiling."""
    return [row for row in rows if row.fraction_of_ceiling > 1]


def stamp(machine: dict[str, Any]) -> str:
    """A fingerprint in one line."""
    memory = "memory kept" if machine["glibc_tunables"] == TUNABLES else "memory as it comes"
    return (
        f"{machine['device']}, {machine['cpu_capability']}, {machine['date']}, commit {machine['commit']}, "
        f"torch {machine['versions']['torch']}, {memory}, load {machine['load_average']:.1f}; "
        "medians of interleaved rounds, speed-ups medians of their ratios"
    )


def write_results(path: Path, device: torch.device, rows: Sequence[Row], **sections: Any) -> None:
    """Rows, the machine's fingerprint and further `sections` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": fingerprint(device), "rows": [asdict(row) for row in rows], **sections}
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def is_usable(case: Case, device: torch.device) -> bool:
    """False for matrix products in bfloat16 where the hardware has none.

    Nobody trains with what takes PyTorch a hundred times as long as float32, and timing it would take hours.
    """
    return case.bound != "gemm" or case.dtype != torch.bfloat16 or native_bf16(device)

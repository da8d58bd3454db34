"""Compiles every kernel that ships, for every target, without a GPU, and locks what came out.

`python -m benchmarks static` brings benchmarks/results/static.lock.json up to date; only rows whose kernel,
arguments or compiler changed are compiled. `--check` changes nothing: it fails when a row is missing or
stale, when a sample that it compiles afresh differs from the lock, or when a rule is broken.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs

from benchmarks.subjects import SUBJECTS, Subject, meta
from gpt.cli import UserError
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.proofs.launches import Launch, captured_launches
from tapelm.proofs.resources import TARGETS, Resources, compile_resources, fixed_addresses
from tapelm.roofline import DEVICES, minimum

LOCK = Path(__file__).parent / "results" / "static.lock.json"
SAMPLE_SECONDS = 30.0
TRIES = 8
"""Compilations of a row that differs from the lock: behind other paths ptxas may give another result."""
FACTS = tuple(field.name for field in fields(Resources))
MEMORY_BOUND = (
    "norm_",
    "cross_entropy",
    "swiglu",
    "rope",
    "bias_gelu",
    "dropout",
    "adamw",
    "grad_norm",
    "nf4_",
    "attention_decode",
)


@dataclass(frozen=True)
class Unit:
    """One launch of one subject at one shape for one target; picklable, unlike the launch itself."""

    subject: int
    shipped: int
    launch: int
    target: str


@cache
def launches(subject: int, shipped: int, target: str) -> list[Launch]:
    """The distinct launches of a subject at a shipped shape, with the configuration of `target`."""
    chosen: Subject = SUBJECTS[subject]
    dtype, shape = chosen.shipped[shipped]
    with assumed_architecture(target), captured_launches() as found:
        CUDA_LAUNCHERS[chosen.launcher](*chosen.arguments(meta(dtype), *shape))
    return list({launch.specialize(TARGETS[target].gpu).key: launch for launch in found}.values())


def units(targets: Sequence[str] = tuple(TARGETS)) -> Iterator[Unit]:
    for target in targets:
        for subject, chosen in enumerate(SUBJECTS):
            for shipped in range(len(chosen.shipped)):
                for launch in range(len(launches(subject, shipped, target))):
                    yield Unit(subject, shipped, launch, target)


def identity(unit: Unit) -> dict[str, Any]:
    """What a row is about: kernel, shape, dtype, target, key of the source, predicted time of the op."""
    chosen = SUBJECTS[unit.subject]
    dtype, shape = chosen.shipped[unit.shipped]
    launch = launches(unit.subject, unit.shipped, unit.target)[unit.launch]
    work = minimum(chosen.launcher, *chosen.arguments(meta(dtype), *shape))
    return {
        "op": chosen.launcher,
        "kernel": launch.name,
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "target": unit.target,
        "key": launch.specialize(TARGETS[unit.target].gpu).key,
        "op_predicted_us": round(1e6 * work.seconds(DEVICES[unit.target], dtype), 2),
    }


def facts(unit: Unit, *, fixed: bool = True) -> dict[str, Any]:
    """What it compiles to, or the compiler's complaint; see `compile_resources`."""
    target = TARGETS[unit.target]
    launch = launches(unit.subject, unit.shipped, unit.target)[unit.launch]
    try:
        return asdict(compile_resources(launch.specialize(target.gpu), target, fixed=fixed))
    except triton.CompilationError as error:
        return {"error": str(error).splitlines()[-1]}
    except triton.runtime.errors.PTXASError as error:
        return {"error": str(error).splitlines()[-1]}


def _facts_before(task: tuple[Unit, float]) -> dict[str, Any] | None:
    unit, deadline = task
    return facts(unit) if time.monotonic() < deadline else None


def _difference(task: tuple[Unit, float, dict[str, Any]]) -> list[str] | None:
    """In which facts a row that is compiled afresh differs from the locked one; None when it is too late."""
    unit, deadline, locked = task
    found = _facts_before((unit, deadline))
    if found is None:
        return None
    tries = 1
    while (changed := _changes(locked, found)) and tries < TRIES:
        found, tries = facts(unit, fixed=False), tries + 1
    return changed


def _changes(locked: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{fact} was {locked.get(fact)}, is {now}" for fact, now in found.items() if locked.get(fact) != now
    ]


# (kernel, part of the shape, part of the complaint): what does not hold, and why it is left.
KNOWN = (
    # Of 36 bytes 4 are a scale, of which a thread needs one; nested scales are looked up by their index.
    ("nf4_dequantize", "", "128-bit"),
)


def broken_rules(row: dict[str, Any]) -> list[str]:
    """What must hold of every row, as sentences where it does not."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes per thread")
    if row["shared"] > TARGETS[row["target"]].shared:
        found.append(f"needs {row['shared']} bytes of shared memory")
    if row["occupancy"] == 0:
        found.append("does not fit a multiprocessor")
    kinds = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
    kind = kinds.get(row["target"], "HMMA")
    multiplies = re.match(r"attention_(forward|decode|backward)|lora_linear", row["kernel"])
    # Tiles of fewer than 64 queries are too small for newer instructions, and wait for memory anyway.
    decodes = row["kernel"].startswith("attention_decode")
    kinds_taken = {kind, "HMMA"} if decodes else {kind}
    if multiplies and row["dtype"] != "float32" and not kinds_taken & row["tensor_cores"].keys():
        found.append(f"has no {kind} but {row['tensor_cores'] or 'no matrix instructions'}")
    sizes = [int(size) for size in row["shape"].split("x") if size.isdigit()]
    odd = any(size % 16 for size in (sizes[4:5] if decodes else sizes))  # of which rows are made
    # An AMD wave has twice the lanes: its 64-bit loads of half precision are as many bytes an instruction.
    nvidia = row["target"].startswith("sm_")
    if nvidia and row["kernel"].startswith(MEMORY_BOUND) and not odd and row["wide_loads"] < 0.9:
        found.append(f"loads {100 * row['wide_loads']:.0f}% of its bytes with 128-bit loads")
    return [
        rule
        for rule in found
        if not any(row["kernel"].startswith(k) and s in row["shape"] and r in rule for k, s, r in KNOWN)
    ]


def name_of(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['kernel']} {row['shape']} {row['dtype']} {row['target']}"


def _read() -> dict[str, dict[str, Any]]:
    if not LOCK.exists():
        return {}
    return {name_of(row): row for row in json.loads(LOCK.read_text(encoding="utf-8"))["rows"]}


def _write(rows: Sequence[dict[str, Any]]) -> None:
    """One row a line, so that a change of the lock reads well in review."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n'
    temporary = LOCK.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, LOCK)


def update(seconds: float) -> list[dict[str, Any]]:
    """Compiles what is new or changed, starting none after `seconds`; writes and returns the rows."""
    locked = _read()
    wanted = [(unit, identity(unit)) for unit in units()]
    compiled = {row["key"]: row for row in locked.values() if "error" in row or row.keys() >= set(FACTS)}
    pending: dict[str, Unit] = {}
    for unit, row in wanted:
        if row["key"] not in compiled:
            pending.setdefault(row["key"], unit)
    started = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = zip(
            pending,
            pool.map(_facts_before, [(unit, started + seconds) for unit in pending.values()]),
            strict=True,
        )
        for key, found in track(results, "compiling", len(pending), console=Console(stderr=True)):
            if found is not None:
                compiled[key] = found
    rows = []
    for _, row in wanted:
        if found := compiled.get(row["key"]):
            rows.append({**row, **{name: found[name] for name in (*FACTS, "error") if name in found}})
    _write(rows)
    return rows


def check(seconds: float) -> list[str]:
    """What is wrong with the lock, one sentence each; compiles a sample of it afresh for so many seconds."""
    if not LOCK.exists():
        return [f"{LOCK} is missing: run python -m benchmarks static"]
    version = json.loads(LOCK.read_text(encoding="utf-8"))["triton"]
    if version != triton.__version__:
        return [
            f"the lock was made with Triton {version}, this is {triton.__version__}: install constraints.txt"
        ]
    locked = _read()
    wanted = {name_of(row): (unit, row) for unit in units() for row in [identity(unit)]}
    drift = [f"{name} is locked but no longer ships" for name in locked.keys() - wanted.keys()]
    drift += [f"{name} is not locked" for name in wanted.keys() - locked.keys()]
    stale = [
        name for name, (_, row) in wanted.items() if name in locked and locked[name]["key"] != row["key"]
    ]
    # Stale rows first, which shows what their change did; then rows from all over the lock.
    order = stale + sorted(wanted.keys() & locked.keys() - set(stale), key=lambda name: locked[name]["key"])
    deadline = time.monotonic() + min(seconds, SAMPLE_SECONDS)
    seen: set[str] = set()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = [(wanted[name][0], deadline, locked[name]) for name in order]
        for name, changed in zip(order, pool.map(_difference, tasks), strict=True):
            if changed is not None:
                seen.add(name)
                drift += [f"{name}: {change}" for change in changed]
    drift += [f"{name}: its source or launch changed; the lock needs an update" for name in stale]
    drift += [f"{name} {rule}" for name, row in locked.items() for rule in broken_rules(row)]
    print(f"static: {len(seen)} of {len(wanted)} locked rows compiled afresh, {len(drift)} complaints")
    return drift


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a line per kernel, shape and dtype and a column per target."""
    table = Table(title="registers · occupancy · 128-bit load share (matrix instructions); ! breaks a rule")
    for column in ("kernel", "shape", "dtype", *TARGETS):
        table.add_column(column)
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cell = "does not compile"
        if "error" not in row:
            products = " ".join(f"{kind} {count}" for kind, count in row["tensor_cores"].items())
            cell = f"{row['registers']} · {row['occupancy']:.0%} · {row['wide_loads']:.0%} {products}"
        cell += " !" if broken_rules(row) else ""
        lines.setdefault((row["kernel"], row["shape"], row["dtype"]), {})[row["target"]] = cell
    for key, cells in lines.items():
        table.add_row(*key, *(cells.get(target, "") for target in TARGETS))
    Console(width=220).print(table)


def run(check_only: bool, seconds: float) -> int:
    """The command; returns the exit status."""
    if knobs.runtime.interpret:
        raise UserError("static compiles kernels, which TRITON_INTERPRET=1 prevents; unset it")
    if check_only:
        complaints = check(seconds)
    else:
        with fixed_addresses() as fixed:
            if not fixed:
                raise UserError(
                    "static: this system loads programs at random addresses and lets nobody change that, as "
                    "Docker does, so that ptxas gives some kernels other registers every time: update the "
                    "lock outside, or with docker run --security-opt seccomp=unconfined"
                )
        rows = update(seconds)
        report(rows)
        complaints = [f"{name_of(row)} {rule}" for row in rows for rule in broken_rules(row)]
        wanted = sum(1 for _ in units())
        if len(rows) < wanted:
            complaints.append(f"{wanted - len(rows)} of {wanted} rows are missing: run it again")
    for complaint in complaints:
        print(complaint)
    return 1 if complaints else 0

"""Compilation ahead of time; in processes of its own, as interpreted kernels cannot be compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "benchmarks/results/static.lock.json"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_the_lock_is_of_what_ships_and_keeps_the_rules() -> None:
    """Every launch has a row made from its present source, and no row breaks a rule."""
    script = """
from benchmarks import static
locked = static._read()
wanted = {static.name_of(row): row for unit in static.units() for row in [static.identity(unit)]}
print([name for name in wanted.keys() ^ locked.keys()])
print([name for name, row in wanted.items() if name in locked and locked[name]["key"] != row["key"]])
print([(name, rules) for name, row in locked.items() if (rules := static.broken_rules(row))])
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "[]"]


def test_the_lock_names_every_target() -> None:
    rows = json.loads(LOCK.read_text(encoding="utf-8"))["rows"]
    by_target = {row["target"]: 0 for row in rows}
    for row in rows:
        by_target[row["target"]] += 1
    assert set(by_target) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert min(by_target.values()) > 70
    assert any("50257" in row["shape"] for row in rows)


SPILLING = """
import torch
from benchmarks import static
from benchmarks.subjects import SUBJECTS, meta
from tapelm import _attention_configs
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.proofs.launches import captured_launches
from tapelm.proofs.resources import TARGETS, compile_resources
from dataclasses import asdict

_attention_configs.BY_ARCHITECTURE["sm_80", "forward"] = {{(2, 128, False): {config}}}
subject = next(subject for subject in SUBJECTS if subject.launcher == "attention_forward")
with assumed_architecture("sm_80"), captured_launches() as launches:
    CUDA_LAUNCHERS[subject.launcher](*subject.arguments(meta(torch.bfloat16), 1, 4, 4, 1024, 128))
facts = asdict(compile_resources(launches[0].specialize(TARGETS["sm_80"].gpu), TARGETS["sm_80"]))
row = {{"kernel": launches[0].name, "shape": "1024", "dtype": "bfloat16", "target": "sm_80", **facts}}
print(static.broken_rules(row))
"""


def test_fault_block_size_that_spills() -> None:
    done = run("-c", SPILLING.format(config="(128, 128, 4, 3)"))
    assert done.returncode == 0, done.stderr
    assert "spills" in done.stdout


def test_fault_shared_memory_that_does_not_fit() -> None:
    done = run("-c", SPILLING.format(config="(128, 128, 8, 5)"))
    assert done.returncode == 0, done.stderr
    assert "shared memory" in done.stdout


def test_capturing_needs_a_compiler() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "static", "--check"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr + done.stdout


@pytest.mark.slow
def test_check_passes() -> None:
    done = run("-m", "benchmarks", "static", "--check")
    assert done.returncode == 0, done.stdout + done.stderr

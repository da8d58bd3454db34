"""Programs that start themselves anew with memory kept, and steps in processes without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.elsewhere import Elsewhere
from benchmarks.kept_memory import TUNABLES, VARIABLE, given_back, is_kept
from benchmarks.train import Step
from gpt.cli import UserError

glibc = pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told to keep memory")
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64}


# As python -m benchmarks, with a stock that no seconds are spent on.
LITTLE_STOCK = """
import runpy
from benchmarks import kept_memory
kept_memory.STOCK = 64 << 20
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


@glibc
@pytest.mark.parametrize(("given", "recorded"), [(None, TUNABLES), ("", None)])
def test_ops_are_measured_with_memory_kept_unless_told_otherwise(
    tmp_path: Path, given: str | None, recorded: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {} if given is None else {VARIABLE: given}
    command = [sys.executable, "-c", LITTLE_STOCK, "ops", "--only", "dropout", "--quick", "--rounds", "1"]
    subprocess.run([*command, "--json", tmp_path / "x.json"], check=True, env=environment, timeout=200)
    machine = json.loads((tmp_path / "x.json").read_text())["machine"]
    assert machine["glibc_tunables"] == recorded
    assert machine["command"].startswith("python -m benchmarks ops --only dropout --quick")


STOCKED = """
import resource, torch
from benchmarks import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept_memory.STOCK = 64 << 20
kept_memory.stock_up()
print(faults())
"""


@glibc
@pytest.mark.parametrize("kept", [True, False])
def test_what_grows_after_stocking_up_waits_for_no_pages(kept: bool) -> None:
    """48 MB are 24 huge pages; as memory comes, nothing is stocked up."""
    done = subprocess.run(
        [sys.executable, "-c", STOCKED], check=True, capture_output=True, text=True, timeout=200,
        env={**os.environ, VARIABLE: TUNABLES if kept else ""},
    )  # fmt: skip
    assert (int(done.stdout) < 5) is kept


def test_given_back_is_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, TUNABLES)
    with pytest.raises(UserError), given_back():
        assert not is_kept() and VARIABLE not in os.environ
        raise UserError("x")
    assert is_kept()
    monkeypatch.setenv(VARIABLE, "glibc.malloc.check=3")
    with given_back():
        assert os.environ[VARIABLE] == "glibc.malloc.check=3"


def test_a_step_elsewhere_is_the_same_step() -> None:
    build = partial(Step, "demo", "plain", 2, torch.device("cpu"), sizes=SIZES)
    here, there = build(), Elsewhere(build)
    assert (there.label, there.shape, there.flops) == (here.label, here.shape, here.flops)
    assert there.evaluate() == pytest.approx(here.evaluate(), rel=1e-5)
    for _ in range(2):
        here()
        there()
    assert there.losses == pytest.approx(list(map(float, here.losses)), rel=1e-3)


def test_what_fails_elsewhere_is_raised_here() -> None:
    with pytest.raises(UserError, match="no_such_preset"):
        Elsewhere(partial(Step, "no_such_preset", "plain", 2, torch.device("cpu")))

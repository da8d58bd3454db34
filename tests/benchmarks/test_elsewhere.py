"""Ctrl-C where a benchmark has a process of its own at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.elsewhere import result_of
from gpt.cli import run_program

def work():
    print("at work", flush=True)
    time.sleep(300)

def main(_):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        print("started", flush=True)
        return result_of(pool, work)

if __name__ == "__main__":
    run_program(main)
"""


@pytest.mark.parametrize("at_work", [False, True])  # while the child imports, and later
def test_an_interrupt_ends_both_in_one_line(at_work: bool, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        start_new_session=True,
    )
    assert program.stdout is not None and program.stdout.readline() == "started\n"
    if at_work:
        assert program.stdout.readline() == "at work\n"
    else:
        time.sleep(0.2)
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does, to all of them
    said, _ = program.communicate(timeout=60)  # which a child still at work would keep open
    assert said == "error: interrupted\n" and program.returncode == 130

"""Peak memory of training steps, each in a process of its own: bytes over what the process held before.

What is not the step's must be held before: libraries that it imports when it first needs them, and pages of
libraries that are files, which count from when they are first read.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks.elsewhere import children_end_with_us, mute_children, unmuted
from benchmarks.kept_memory import given_back
from gpt.hardware import peak_memory_bytes, set_threads

STEPS = 2
"""The second has the optimizer's state beside the activations."""
MODULES = ("benchmarks.gpt_ladder", "torch._dynamo")
"""torch.optim imports the latter when it first needs it."""
MADV_POPULATE_READ = 22

Build = Callable[[], Callable[[], object]]


def measure(
    builds: Sequence[Build], elsewhere: Sequence[bool], modules: Sequence[str], device: torch.device
) -> list[float]:
    """Bytes at the peak of each step that a picklable function of `builds` makes.

    Two processes at a time; OpenMP's threads sleep while they wait for work, as spinning would keep the other
    process from its core. Processes are forked from one that has imported `modules`, which takes longer than
    a step; those of `elsewhere`, whose C library gives memory back, are new and import them.
    """
    spawn, forked = multiprocessing.get_context("spawn"), multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["__main__", __name__, *MODULES, *modules])
    task = partial(unmuted, _peak, str(device), torch.get_num_threads(), (*MODULES, *modules))
    found: dict[int, float] = {}
    for there, context in ((False, forked), (True, spawn)):
        own = [index for index, each in enumerate(elsewhere) if each is there]
        with (
            given_back() if there else contextlib.nullcontext(),
            _environment("OMP_WAIT_POLICY", "passive"),
            ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool,
        ):
            if not there:
                _wait_for_imports(forked)
            with mute_children():
                peaks = pool.map(task, [builds[index] for index in own])
            with children_end_with_us():
                found |= zip(own, peaks, strict=True)
    return [found[index] for index in range(len(builds))]


def _wait_for_imports(forked: multiprocessing.context.ForkServerContext) -> None:
    """Until a process can be forked. It takes seconds, in which Ctrl-C ends this process as ever."""
    with mute_children():
        multiprocessing.forkserver.ensure_running()
    first = forked.Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None: ...


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    """Of processes that start meanwhile."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _peak(device: str, threads: int, modules: Sequence[str], build: Build) -> float:
    set_threads(threads)
    for module in modules:
        importlib.import_module(module)
    _read_libraries()
    before = peak_memory_bytes(torch.device(device))
    step = build()
    for _ in range(STEPS):
        step()
    return float(peak_memory_bytes(torch.device(device)) - before)


def _read_libraries() -> None:
    """Hold all pages of files that this process has mapped.

    Where the system cannot (Linux has it since 5.14), those that a step reads first count as the step's.
    """
    maps, libc = Path("/proc/self/maps"), ctypes.CDLL(None)
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.is_file() else []:
        span, access, _, _, file, *_ = line.split()
        if file != "0" and access.startswith("r"):
            begin, end = (int(address, 16) for address in span.split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_POPULATE_READ)

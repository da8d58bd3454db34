"""A training step in a process of its own, with memory as the C library has it or in another environment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.kept_memory import given_back
from gpt.cli import UserError
from gpt.hardware import peak_memory_bytes, set_threads

TRAITS = ("label", "shape", "dtype", "tokens", "flops")
ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def mute_children() -> Iterator[None]:
    """Processes that start meanwhile take no notice of Ctrl-C until they are `unmuted`.

    What they import would print where it was met.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def unmuted(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a process is to do, once it has imported what that needs; Ctrl-C ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return function(*arguments)


@contextlib.contextmanager
def children_end_with_us() -> Iterator[None]:
    """Ctrl-C ends those that were mute, too."""
    try:
        yield
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def result_of(pool: Executor, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a picklable function gives in a new process of `pool`."""
    with mute_children():
        future = pool.submit(unmuted, function, *arguments)
    with children_end_with_us():
        return future.result()


class Elsewhere:
    """Stands for the step that `build`, a picklable function, makes in the process; see ladder.Step.

    Without `python` the process has what this one imports, and the C library gives memory back there. With
    `python`, an interpreter of an environment that has tapelm as well, it has the libraries there
    and this process's environment variables. It waits between steps and ends with this object.
    """

    label: str
    shape: str
    dtype: torch.dtype
    tokens: float
    flops: float

    def __init__(self, build: Callable[[], Any], *, python: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess | subprocess.Popen[bytes]
        if python is None:
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with given_back(), mute_children():
                self._process.start()
        else:
            with mute_children():
                self._process = _start(python, theirs)
        theirs.close()
        self.__dict__ |= self._ask((build, torch.get_num_threads()))
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        self.losses.append(torch.tensor(self._ask("step")))

    def evaluate(self) -> float:
        return self._ask("evaluate")

    def peak_memory(self) -> int:
        """Bytes of the whole process so far."""
        return self._ask("peak_memory")

    def gradient_norm(self) -> float:
        return self._ask("gradient_norm")

    def close(self) -> None:
        """End the process and wait for that."""
        self._pipe.close()
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()

    def _ask(self, what: Any) -> Any:
        try:
            self._pipe.send(what)
            # Not recv alone: what the process has started may hold the other end open when it is gone itself.
            while not self._pipe.poll(1.0):
                if not self._is_alive() and not self._pipe.poll():
                    raise EOFError
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError("a step's own process has ended; what it printed says why") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _is_alive(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return self._process.is_alive()


def _start(python: Path, pipe: Any) -> subprocess.Popen[bytes]:
    """Run this module by `python`; what it prints goes to stderr."""
    command = [str(python), "-m", "benchmarks.elsewhere", str(pipe.fileno())]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=2, env=environment, pass_fds=[pipe.fileno()]
        )
    except OSError as error:
        raise UserError(f"{python} is no Python that could be started: {error}") from error


def _serve(pipe: Any) -> None:
    try:
        build, threads = pipe.recv()
        set_threads(threads)
        step = unmuted(build)
        pipe.send({name: getattr(step, name) for name in TRAITS})
        while True:
            match pipe.recv():
                case "step":
                    step()
                    pipe.send(float(step.losses[-1]))
                case "evaluate":
                    pipe.send(step.evaluate())
                case "gradient_norm":
                    pipe.send(step.gradient_norm())
                case "peak_memory":
                    pipe.send(peak_memory_bytes(step.device))
    except EOFError:
        pass  # the other end is gone
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        traceback.print_exc()
        pipe.send(RuntimeError(f"in a step's own process: {error!r}"))  # its own class may not be known there


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    _serve(Connection(int(sys.argv[1])))

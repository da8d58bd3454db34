"""A training step in a process of its own, in which the C library treats memory as it does by itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.kept_memory import given_back
from gpt.hardware import set_threads

TRAITS = ("label", "shape", "dtype", "tokens", "flops")


class Elsewhere:
    """Stands for the step that `build`, a picklable function, makes in the process; see ladder.Step.

    The process waits between steps and ends with this object.
    """

    label: str
    shape: str
    dtype: torch.dtype
    tokens: float
    flops: float

    def __init__(self, build: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        with given_back():
            process = context.Process(
                target=_serve, args=(build, torch.get_num_threads(), theirs), daemon=True
            )
            process.start()
        theirs.close()
        self.__dict__ |= self._receive()
        self.losses: list[torch.Tensor] = []

    def __call__(self) -> None:
        self._pipe.send("step")
        self.losses.append(torch.tensor(self._receive()))

    def evaluate(self) -> float:
        self._pipe.send("evaluate")
        return self._receive()

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(build: Callable[[], Any], threads: int, pipe: Connection) -> None:
    try:
        set_threads(threads)
        step = build()
        pipe.send({name: getattr(step, name) for name in TRAITS})
        while True:
            if pipe.recv() == "evaluate":
                pipe.send(step.evaluate())
            else:
                step()
                pipe.send(float(step.losses[-1]))
    except EOFError:
        pass  # the other end is gone
    except Exception as error:
        pipe.send(error)

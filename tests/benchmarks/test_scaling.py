"""Exponents with their errors, and the whole measurement by a fake clock."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks import planner, scaling
from benchmarks.harness import FEW_VALUES

CPU = torch.device("cpu")


def test_the_error_of_an_exponent_is_that_of_the_fit_or_of_the_rounds() -> None:
    sizes = [1, 2, 4, 8]
    assert scaling.power(sizes, [[3 * size**0.7] * 5 for size in sizes]) == pytest.approx((0.7, 0), abs=1e-9)
    seconds = [1.0, 1.8, 4.4, 7.0]
    slope, covariance = np.polyfit(np.log(sizes), np.log(seconds), 1, cov=True)
    expected = slope[0], math.sqrt(covariance[0, 0])
    assert scaling.power(sizes, [[each] * 5 for each in seconds]) == pytest.approx(expected)
    drifting = [[hour * size**0.7 for hour in (1.0, 1.3, 1.1, 2.0, 1.2)] for size in sizes]
    assert scaling.power(sizes, drifting) == pytest.approx((0.7, 0), abs=1e-9)
    powers = [0.99, 1.0, 1.01, 1.02, 0.98]
    found, error = scaling.power([1, 2], [[1.0] * 5, [2**power for power in powers]])
    spread = 1.2533 * 1.4826 * FEW_VALUES[5] * 0.01 / math.sqrt(5)
    assert (found, error) == (pytest.approx(1.0), pytest.approx(spread, rel=0.02))


class FakeStep:
    label, shape, dtype, flops = "fake", "1 x 1", torch.float32, 1e-9

    def __init__(self, run) -> None:
        self.run = run

    def __call__(self) -> None:
        self.run()


def test_a_measurement_shows_its_progress_and_states_the_errors(clock, monkeypatch, capsys) -> None:
    """Time goes with the square root of the batch, and, which is no power, with one more than the layers."""
    now = {"threads": 2}

    def build(shape: dict[str, int], device: torch.device) -> FakeStep:
        def run() -> None:
            clock.now += shape["batch_size"] ** 0.5 * (1 + shape["n_layer"]) / now["threads"]

        return FakeStep(run)

    monkeypatch.setattr(scaling, "build", build)
    monkeypatch.setattr(scaling, "set_threads", lambda count: now.update(threads=count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows, section = scaling.measure(CPU, 3)
    said = capsys.readouterr()
    assert all(work in said.err for work in ("warming up", "all shapes", "threads")) and "100%" in said.err
    assert len([row for row in rows if row.subject == "scaling"]) == 13 + len(scaling.HELD_OUT)
    exponents, errors = section["exponents"], section["exponent_errors"]
    assert errors.keys() == exponents.keys() == {*scaling.CURVES, "threads"}
    assert (exponents["batch_size"], exponents["threads"]) == pytest.approx((0.5, -1), abs=1e-3)
    assert max(errors["batch_size"], errors["threads"]) < 1e-3 < 0.02 < errors["n_layer"]
    assert f"n_layer to the power {exponents['n_layer']:.2f} ±{errors['n_layer']:.2f}" in said.out
    assert set(section["multiples"]) == set(planner.PARTS)

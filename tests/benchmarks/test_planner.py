"""The planner recovers multiples from points made with them, and says what its figures are worth."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import planner, scaling
from benchmarks.harness import write_results
from benchmarks.planner import PARTS, Point
from gpt.cli import UserError
from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.ops import PLAIN
from tapelm.roofline import Device

RATES = Device("here", 2e10, 4e11, 1.5e11)
MULTIPLES = [1.3, 4.0, 2.0, 1.1, 3.0]


def model(shape: dict[str, int]) -> ModelConfig:
    return ModelConfig(**{k: v for k, v in shape.items() if k != "batch_size"}, dropout=0.0)


def points(shapes) -> list[Point]:
    made = []
    for shape in shapes:
        seconds = planner.predict(model(shape), shape["batch_size"], RATES, MULTIPLES)
        made.append(Point(model(shape), shape["batch_size"], seconds, RATES))
    return made


CURVE_SHAPES = list(
    {scaling.name_of(shape): shape for curve in scaling.shapes().values() for shape in curve}.values()
)


def test_the_fit_recovers_what_made_the_points_on_shapes_it_has_not_seen() -> None:
    multiples = planner.fit(points(CURVE_SHAPES))
    assert multiples == pytest.approx(MULTIPLES, rel=1e-3)
    assert max(map(abs, planner.errors(points(scaling.HELD_OUT), multiples))) < 1e-6


def test_nothing_is_faster_than_its_ceiling() -> None:
    """Times that fall with the vocabulary would want negative multiples, short ones multiples below 1."""
    for share in (lambda p: 1 / p.model.vocab_size, lambda p: 0.2):
        made = [Point(p.model, p.batch_size, p.seconds * share(p), RATES) for p in points(CURVE_SHAPES)]
        assert all(m >= least for m, least in zip(planner.fit(made), planner.LEAST, strict=True))


def test_held_out_shapes_are_on_no_curve() -> None:
    assert not {scaling.name_of(s) for s in scaling.HELD_OUT} & {scaling.name_of(s) for s in CURVE_SHAPES}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    sizes = [1, 2, 4, 8]
    assert scaling.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_parameters_are_those_of_the_model() -> None:
    shape = ModelConfig(3, 2, 32, 16, 100, 0.0)
    assert planner.parameters(shape) == sum(p.numel() for p in GPT(shape, PLAIN).parameters())


def test_more_gpus_take_no_shorter_steps_and_more_tokens() -> None:
    one, eight, many = (planner.plan("gpt2", 8, "H100", gpus, MULTIPLES) for gpus in (1, 8, 64))
    assert one.seconds < eight.seconds < many.seconds
    assert [eight.tokens, many.tokens] == [8 * one.tokens, 64 * one.tokens]
    assert all(plan.floor_seconds <= plan.seconds for plan in (one, eight, many))
    assert 124e6 * planner.STATE_BYTES < one.memory < 80e9


SECTION = {
    "multiples": dict(zip(PARTS, MULTIPLES, strict=True)),
    "multiples_without": {"n_embd": dict.fromkeys(PARTS, 9.0)},
    "held_out_errors": {"a": -0.2, "b": 0.1},
}


@pytest.mark.parametrize("gpu", planner.GPUS)
def test_memory_that_a_gpu_has_not_is_said_with_what_would_fit(gpu: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.json"
    write_results(path, torch.device("cpu"), [], plan=SECTION)
    planner.run(path, "gpt2", 1000, gpu, 64, None, 1e9)
    said = " ".join(capsys.readouterr().out.split())
    memory = planner.plan("gpt2", 1000, gpu, 64, MULTIPLES).memory
    assert memory > planner.DEVICES[planner.GPUS[gpu]].memory
    assert f"{memory / 1e9:.1f} GB, does not fit" in said and f"Does not fit: {gpu} has " in said
    largest = int(re.findall(r"--batch-size (\d+) is the most", said)[0])
    for size, fits in ((largest, True), (largest + 1, False)):
        planner.run(path, "gpt2", size, gpu, 1, None, 1e9)
        assert ("fit:" not in capsys.readouterr().out) is fits
    assert "no batch fits" in planner.too_large(planner.Plan(1.0, 1.0, 3e12, 2e12, 9, 1), 2, gpu)


def test_the_command_states_its_error(tmp_path: Path, monkeypatch, capsys) -> None:
    write_results(tmp_path / "x-scaling.json", torch.device("cpu"), [], plan=SECTION)
    low, high = (planner.plan("gpt2", 8, "H100", 64, m).seconds for m in (MULTIPLES, [9.0] * len(PARTS)))
    assert low < high
    for path in (None, tmp_path / "x-scaling.json"):
        monkeypatch.setattr(planner, "RESULTS", tmp_path if path is None else tmp_path / "none")
        assert planner.run(path, "gpt2", None, "H100", 64, 2.0, 1e9) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "gpt2 on 64 x H100, 8 windows" in said and "predicted within 20%" in said
        assert " min to " in said and " ms to " in said and "Hardly worth using" not in said
        assert "no step has been measured" in said and "at $2 a GPU hour" in said
        assert f"{1e3 * low:.1f} ms to {1e3 * high:.1f} ms" in said
    write_results(
        tmp_path / "x.json", torch.device("cpu"), [], plan=SECTION | {"held_out_errors": {"a": 0.5}}
    )
    planner.run(tmp_path / "x.json", "gpt2", 1000, "a10g", 1, None, 1e12)
    said = " ".join(capsys.readouterr().out.split())
    assert "gpt2 on 1 x A10G" in said and " s to " in said and " h to " in said and "e+0" not in said
    assert "Hardly worth using: x.json is of a busy machine" in said


@pytest.mark.parametrize("plan", [None, {}, {"multiples": {"products": 1.0}, "multiples_without": {}}])
def test_a_file_without_a_plan_is_named(plan: object, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    write_results(path, torch.device("cpu"), [], **({} if plan is None else {"plan": plan}))
    with pytest.raises(UserError, match=r"other\.json holds no plan"):
        planner.fitted(path)


@pytest.mark.parametrize(
    ("gpu", "gpus", "told"), [("H999", 1, "unknown --gpu 'H999'"), ("H100", 0, "--gpus must be at least 1")]
)
def test_unknown_hardware_is_refused(gpu: str, gpus: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        planner.plan("gpt2", 8, gpu, gpus, MULTIPLES)


@pytest.mark.parametrize(
    ("batch_size", "dollars", "tokens", "told"),
    [
        (0, None, 1e9, "--batch-size must be at least 1, got 0"),
        (None, None, 0.0, "--tokens must be a number above 0"),
        (None, None, math.nan, "--tokens must be a number above 0, got nan"),
        (None, math.nan, 1e9, "--dollars must be a number of at least 0, got nan"),
        (None, -1.0, 1e9, "--dollars"),
    ],
)
def test_numbers_that_plan_nothing_are_refused(
    batch_size: int | None, dollars: float | None, tokens: float, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        planner.run(None, "gpt2", batch_size, "H100", 8, dollars, tokens)


def test_without_measured_steps_there_is_no_plan(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(planner, "RESULTS", tmp_path)
    with pytest.raises(UserError, match="python -m benchmarks scaling"):
        planner.fitted(None)


def test_committed_measurements_are_within_a_quarter() -> None:
    files = sorted(planner.RESULTS.glob("*scaling*.json"))
    for file in files:
        held_out = json.loads(file.read_text())["plan"]["held_out_errors"]
        assert max(map(abs, held_out.values())) <= 0.25 and math.isfinite(sum(held_out.values())), file

"""Presets, the command line and the learning-rate schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.cli import UserError
from gpt.config import PRESETS, parse_command_line, preset

HERE = {"data": Path("d"), "out": Path("o")}


def test_seed_is_the_original_projects_model() -> None:
    seed = preset("seed", **HERE)
    assert (seed.n_layer, seed.n_head, seed.n_embd, seed.block_size, seed.vocab_size) == (
        6,
        8,
        512,
        256,
        10_000,
    )
    assert (seed.batch_size, seed.dropout, seed.learning_rate, seed.epochs) == (16, 0.1, 3e-4, 10)
    assert seed.max_steps is None


def test_gpt2_has_124_million_parameters_without_its_head() -> None:
    shape = preset("gpt2", **HERE).model(50_257)
    width, layers = shape.n_embd, shape.n_layer
    blocks = layers * (12 * width**2 + 13 * width) + 2 * width
    assert shape.vocab_size == 50_304
    assert blocks + (shape.vocab_size + shape.block_size) * width == pytest.approx(124.4e6, rel=0.001)


@pytest.mark.parametrize("name", PRESETS)
def test_command_line_overrides_single_values_of_a_preset(name: str) -> None:
    given = ["--preset", name, "--data", "d", "--out", "o", "--max-steps", "7", "--n-layer", "3", "--compile"]
    assert parse_command_line(given) == preset(name, **HERE, max_steps=7, n_layer=3, compile=True)
    assert parse_command_line(["--out=o", f"--preset={name}", "--data=d"]) == preset(name, **HERE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; choose one of: demo, seed, finance, tape, gpt2"),
        ({"kernels": "plain", "precision": "bf16"}, "needs the fp32 master"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    given = {"preset": "demo"} | options
    with pytest.raises(UserError, match=message):
        preset(given.pop("preset"), **HERE, **given)


def test_model_shape_is_checked_against_the_tokenizer() -> None:
    assert preset("demo", **HERE).model(4321).vocab_size == 4321
    with pytest.raises(UserError, match="vocab_size 10000 is smaller than the tokenizer's 12000"):
        preset("seed", **HERE).model(12_000)
    with pytest.raises(UserError, match=r"n_embd \(256\) must be a multiple of n_head \(3\)"):
        preset("demo", **HERE, n_head=3).model(100)


def test_warmup_then_cosine_to_the_floor() -> None:
    config = preset("demo", **HERE, learning_rate=1.0, warmup_steps=4, min_learning_rate_ratio=0.1)
    rates = [config.learning_rate_at(step, 104) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[54] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert preset("demo", **HERE, warmup_steps=0).learning_rate_at(0, 10) == 1e-3


def test_help_describes_every_preset_and_option(capsys) -> None:
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in said for name in PRESETS)
    assert (
        "gpt2: 12 layers, 12 heads, width 768, 1024 tokens of context, vocabulary 50,304, 64 windows" in said
    )

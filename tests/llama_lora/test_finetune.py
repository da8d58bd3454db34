"""Whole runs on a tiny model: what they write, that they learn, and that a killed one goes on bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt import checkpoint
from gpt.cli import UserError
from llama_lora.adapters import CONFIG, WEIGHTS, load, read_recipe
from llama_lora.backends import TapelmBackend, open_base
from llama_lora.config import FinetuneConfig, parse_command_line
from llama_lora.dataset import find_split
from llama_lora.finetune import finetune
from llama_lora.session import Finetuning

STEPS = {"max_steps": 6, "block_size": 64, "eval_rows": 4, "eval_interval": 3, "warmup_steps": 1}


@pytest.fixture
def settings(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> dict:
    return {"model": tiny_model, "data": tiny_data, "out": tmp_path / "run", "verify": False} | STEPS


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("backend", ["tapelm", "hf"])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_learns_and_writes_its_files(settings, backend, method) -> None:
    config = FinetuneConfig(
        **settings | {"verify": True}, backend=backend, method=method, learning_rate=3e-3, precision="fp32"
    )
    assert finetune(config) == 0
    lines = records(config.out)
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    assert summary["base_perplexity"] == pytest.approx(math.exp(lines[0]["val_loss"]))
    assert summary["tokens"] == lines[-1]["tokens"] <= 6 * 4 * 64
    assert summary["text_sha256"] == checkpoint.sha256_of(find_split(config.data, "val"))
    assert summary["parameters"] == sum(
        p.numel() for p in open_base(config.model, torch.float32).parameters()
    )
    assert (config.out / "loss.png").stat().st_size > 1000
    written = config.out / ("model" if method == "full" else "adapter")
    names = {path.name for path in written.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < names
    assert ("model.safetensors" if method == "full" else WEIGHTS) in names
    if method != "full":
        assert read_recipe(written)[1] == config.model


def test_a_run_that_is_never_better_than_the_base_says_so(settings, capsys, monkeypatch) -> None:
    rising = itertools.count(3)
    monkeypatch.setattr("llama_lora.session.evaluate_rows", lambda *_, **__: float(next(rising)))
    config = FinetuneConfig(**settings, method="lora", precision="fp32")
    assert finetune(config) == 0
    assert not (config.out / "adapter").exists()
    said = " ".join("".join(capsys.readouterr()).split())
    assert "no adapter/, as no evaluation was better than the base model" in said


def test_backends_train_alike(settings) -> None:
    losses = []
    for backend in ("tapelm", "hf"):
        config = FinetuneConfig(
            **settings | {"out": settings["out"] / backend}, backend=backend, precision="fp32",
            optimizer_bits=32, learning_rate=1e-3,
        )  # fmt: skip
        finetune(config)
        losses.append([line["loss"] for line in records(config.out)[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(settings, precision) -> None:
    whole = FinetuneConfig(**settings | {"out": settings["out"] / "whole"}, precision=precision)
    finetune(whole)
    parts = settings | {"out": settings["out"] / "parts"}
    finetune(FinetuneConfig(**parts, precision=precision, stop_after=2))
    lines = records(parts["out"])
    # As if killed after writing two lines of steps that no checkpoint holds, the last one cut short.
    with open(parts["out"] / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0}) + '\n{"step": 4, "lo')
    finetune(FinetuneConfig(**parts, precision=precision, resume="auto"))
    assert records(parts["out"])[: len(lines) - 1] == lines[:-1]
    for key in ("loss", "val_loss", "grad_norm"):
        assert [r.get(key) for r in records(parts["out"]) if r["step"] != 2] == [
            r.get(key) for r in records(whole.out) if r["step"] != 2
        ]
    expected, found = (load_file(c / "adapter" / WEIGHTS) for c in (whole.out, parts["out"]))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_finished_run_is_neither_verified_nor_changed_by_resume(settings, monkeypatch) -> None:
    finetune(FinetuneConfig(**settings))
    before = {path: path.read_bytes() for path in settings["out"].rglob("*") if path.is_file()}
    monkeypatch.setattr("llama_lora.session.verify", None)
    assert finetune(FinetuneConfig(**settings | {"verify": True}, resume="auto")) == 0
    assert {path: path.read_bytes() for path in settings["out"].rglob("*") if path.is_file()} == before


def test_a_signal_during_the_last_step_leaves_a_finished_run(settings, monkeypatch, capsys) -> None:
    take_step = Finetuning.take_step

    def interrupted(run: Finetuning) -> dict:
        if run.step == STEPS["max_steps"] - 1:
            signal.raise_signal(signal.SIGINT)
        return take_step(run)

    monkeypatch.setattr(Finetuning, "take_step", interrupted)
    assert finetune(FinetuneConfig(**settings)) == 0
    assert json.loads((settings["out"] / "summary.json").read_text(encoding="utf-8"))["steps"] == 6
    assert "go on with" not in capsys.readouterr().err


def test_a_run_that_changed_is_not_resumed(settings) -> None:
    finetune(FinetuneConfig(**settings, stop_after=1))
    with pytest.raises(UserError, match="already holds a run"):
        finetune(FinetuneConfig(**settings))
    with pytest.raises(UserError, match="rank was 16 and is 8"):
        finetune(FinetuneConfig(**settings, rank=8, resume="auto"))
    (saved,) = (settings["out"] / "checkpoints").glob("step-*")
    found = checkpoint.read_state(saved)
    assert set(found["inputs"]) == {"base model", "tokenizer", "training data", "validation data"}
    others = settings["out"].parent / "others"
    shutil.copytree(settings["model"], others / "model")
    weights = load_file(others / "model" / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()},
        others / "model" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="base model was"):
        finetune(FinetuneConfig(**settings | {"model": others / "model"}, resume="auto"))
    shutil.copytree(settings["data"], others / "data")
    with open(find_split(others / "data", "train"), "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="training data was"):
        finetune(FinetuneConfig(**settings | {"data": others / "data"}, resume="auto"))


def test_damaged_weights_are_named(settings) -> None:
    damaged = settings["out"].parent / "damaged"
    shutil.copytree(settings["model"], damaged)
    path = damaged / "model.safetensors"
    weights = {name: torch.full_like(tensor, math.nan) for name, tensor in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the weights in"):
        finetune(FinetuneConfig(**settings | {"model": damaged}))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="logits of the base model are not finite"):
        finetune(FinetuneConfig(**settings | {"model": damaged, "verify": True}))


def test_early_stop_keeps_the_best_adapter(settings, monkeypatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.25, 1.0])
    monkeypatch.setattr("llama_lora.session.evaluate_rows", lambda *arguments: next(losses))
    config = FinetuneConfig(**settings | {"eval_interval": 1, "max_steps": 20}, patience=2)
    finetune(config)
    assert records(config.out)[-1]["step"] == 3
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    assert summary["best_val_loss"] == 2.0
    finetune(dataclasses.replace(config, resume="auto"))  # which ends at once
    assert records(config.out)[-1]["step"] == 3


def test_unchecked_runs_say_so_and_checked_ones_refuse(settings, monkeypatch, capsys) -> None:
    finetune(FinetuneConfig(**settings))
    assert "WARNING: --no-verify" in capsys.readouterr().err
    monkeypatch.setattr("llama_lora.verify.MOST_LEAK", -1.0)
    refused = settings | {"verify": True, "out": settings["out"] / "refused"}
    with pytest.raises(UserError, match="verify: attention leaks"):
        finetune(FinetuneConfig(**refused))
    assert not refused["out"].exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_compiled_steps_are_the_same(settings, method) -> None:
    losses = []
    for compiled in (False, True):
        config = FinetuneConfig(
            **settings | {"out": settings["out"] / str(compiled), "max_steps": 3}, precision="fp32",
            method=method, compile=compiled,
        )  # fmt: skip
        finetune(config)
        losses.append([line["loss"] for line in records(config.out)[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_accumulation_equals_one_large_batch(settings) -> None:
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        config = FinetuneConfig(
            **settings | {"out": settings["out"] / str(batch_size)}, batch_size=batch_size,
            accumulation_steps=accumulation, precision="fp32", learning_rate=1e-3,
        )  # fmt: skip
        finetune(config)
        losses.append([(line["loss"], line["grad_norm"]) for line in records(config.out)[1:4]])
    assert losses[0] == [pytest.approx(pair, rel=1e-3) for pair in losses[1]]


def test_without_packing_tokens_count_no_padding(settings) -> None:
    config = FinetuneConfig(**settings | {"max_steps": 2}, packing=False)
    finetune(config)
    lines = records(config.out)
    assert lines[-1]["tokens"] < 2 * 4 * 64


def test_an_adapter_of_another_shape_is_refused(settings, tiny_model) -> None:
    finetune(FinetuneConfig(**settings | {"max_steps": 3}))
    recipe, _ = read_recipe(settings["out"] / "adapter")
    model = TapelmBackend().load(tiny_model, recipe, torch.float32, torch.device("cpu"))
    adapters = TapelmBackend().adapters(model)
    load(settings["out"] / "adapter", adapters)
    with pytest.raises(UserError, match="has no place for"):
        load(settings["out"] / "adapter", dict(list(adapters.items())[1:]))
    (settings["out"] / "adapter" / CONFIG).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not a LoRA configuration"):
        read_recipe(settings["out"] / "adapter")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": -1.0}, "alpha must be a positive number"),
        ({"target_modules": ("head",)}, "choose from q_proj"),
        ({"patience": -1}, "patience must not be negative"),
    ],
)
def test_settings_out_of_range(settings, changed, said) -> None:
    with pytest.raises(UserError, match=said):
        FinetuneConfig(**settings, **changed)


def test_command_line() -> None:
    needed = ["--model", "m", "--data", "d", "--out", "o"]
    config = parse_command_line([*needed, "--method", "lora", "--no-verify", "--target-modules", "q_proj"])
    assert (config.method, config.verify, config.target_modules) == ("lora", False, ("q_proj",))
    with pytest.raises(UserError, match="--backend"):
        parse_command_line([*needed, "--backend", "jax"])


def test_schedules_end_where_they_should(settings) -> None:
    for schedule, last in (("linear", 0.0), ("cosine", 0.0), ("constant", 2e-4)):
        config = FinetuneConfig(**settings, schedule=schedule)
        assert config.learning_rate_at(0, 10) == pytest.approx(2e-4)
        assert config.learning_rate_at(10, 10) == pytest.approx(last, abs=1e-12)

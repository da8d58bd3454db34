"""Training runs on a tiny corpus: what they write, and that they can be cut anywhere."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpt import checkpoint, session
from gpt.checkpoint import sha256_of
from gpt.cli import UserError, only_writer
from gpt.config import TrainConfig, preset
from gpt.corpus import token_arrays
from gpt.hardware import gemm_peak_flops
from gpt.metrics import summarize
from gpt.train import train

TABLES = ("plain", "optimized")
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "max_steps": 10,
    "warmup_steps": 2,
    "eval_interval": 5,
    "eval_batches": 2,
    "checkpoint_interval": 4,
    "threads": 1,
    "precision": "fp32",
    "device": "cpu",
}


def tiny(data: Path, out: Path, **options: Any) -> TrainConfig:
    return preset("demo", data=data, out=out, **(TINY | options))


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.usefixtures("measured_ceiling")
def test_run_learns_and_writes_everything_it_promises(table: str, tiny_data: Path, tmp_path: Path) -> None:
    assert train(tiny(tiny_data, tmp_path, kernels=table, max_steps=60, learning_rate=1e-2)) == 0
    lines, result = records(tmp_path), summary(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "step_ms", "seconds", "tokens"} <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(5, 61, 5))
    assert lines[-1]["tokens"] == 60 * 4 * 32
    assert result["val_loss"] < 0.7 * lines[0]["loss"]
    fields = "tokens_per_second step_ms_median train_loss val_loss val_bits_per_byte peak_memory_bytes date "
    fields += "model_bytes parameters mfu gemm_peak_flops device versions config seconds batches_sha256"
    assert set(fields.split()) <= set(result)
    assert result["completed"] and 0 < result["mfu"] < 1
    assert result["model_bytes"] == 4 * result["parameters"]
    assert result["peak_memory_bytes"] > 50e6
    assert result["train_loss"] == pytest.approx(sum(line["loss"] for line in lines[-20:]) / 20)
    assert checkpoints(tmp_path) == ["step-00000056", "step-00000060"]


def test_both_tables_see_the_same_batches_and_agree(tiny_data: Path, tmp_path: Path) -> None:
    for table in TABLES:
        train(tiny(tiny_data, tmp_path / table, kernels=table))
    plain, optimized = (summary(tmp_path / table) for table in TABLES)
    assert plain["batches_sha256"] == optimized["batches_sha256"]
    assert optimized["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)
    losses = [[record["loss"] for record in records(tmp_path / table)] for table in TABLES]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    train(tiny(tiny_data, tmp_path / "other", seed=5))
    assert summary(tmp_path / "other")["batches_sha256"] != plain["batches_sha256"]


@pytest.mark.slow
def test_seed_model_keeps_the_losses_of_plain_for_50_steps(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers, heads and width of the `seed` preset, float32, no dropout: as near as rounding lets it.

    What a last bit does to the losses, the plain model itself says: again from weights that differ by one.
    """
    seed = preset("seed", data=tiny_data, out=tmp_path)
    size = {"n_layer": seed.n_layer, "n_head": seed.n_head, "n_embd": seed.n_embd, "dropout": 0.0}

    def losses(table: str, name: str) -> np.ndarray:
        options = size | {"kernels": table, "max_steps": 50, "batch_size": 2, "block_size": 128}
        train(tiny(tiny_data, tmp_path / name, **options))
        return np.array([record["loss"] for record in records(tmp_path / name)])

    plain, optimized = (losses(table, table) for table in TABLES)
    made = session.model_and_optimizer

    def nudged(*arguments: Any, **options: Any) -> Any:
        model, optimizer = made(*arguments, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 2**-23)
        return model, optimizer

    monkeypatch.setattr(session, "model_and_optimizer", nudged)
    again = losses("plain", "nudged")
    assert len(plain) == 50 and plain[-1] < 0.8 * plain[0]
    apart, noise = (np.abs(each / plain - 1) for each in (optimized, again))
    assert apart[:5].max() < 1e-6 and apart.max() < 2 * noise.max() < 1e-3


@pytest.mark.parametrize("table", TABLES)
def test_resume_is_bit_exact_with_dropout(table: str, tiny_data: Path, tmp_path: Path) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    train(tiny(tiny_data, straight, kernels=table, dropout=0.2))
    train(tiny(tiny_data, halves, kernels=table, dropout=0.2, stop_after=5))
    assert not summary(halves)["completed"] and checkpoints(halves)[-1] == "step-00000005"
    torch.manual_seed(999)
    train(tiny(tiny_data, halves, kernels=table, dropout=0.2, resume="auto"))
    last = "checkpoints/step-00000010"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert sha256_of(straight / last / name) == sha256_of(halves / last / name)
    for name in ("loss", "val_loss", "lr", "tokens", "step", "grad_norm"):
        of_straight, of_halves = ([record.get(name) for record in records(out)] for out in (straight, halves))
        # The session that ended after step 5 validated there, as eval_interval does.
        assert of_straight == of_halves
    assert summary(straight)["batches_sha256"] == summary(halves)["batches_sha256"]


def test_bf16_starts_from_the_weights_of_fp32(tiny_data: Path, tmp_path: Path) -> None:
    """Not from the rounded ones: those train like another seed, percents away after a hundred steps."""
    for precision in ("fp32", "bf16"):
        options = {"precision": precision, "stop_after": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
        train(tiny(tiny_data, tmp_path / precision, **options))
    last = "checkpoints/step-00000001"
    exact = load_file(tmp_path / "fp32" / last / "model.safetensors")
    masters = load_file(tmp_path / "bf16" / last / "optimizer.safetensors")
    for value in exact.values():
        assert any(
            torch.allclose(value, other, atol=1e-9)
            for other in masters.values()
            if other.shape == value.shape
        )


@pytest.mark.parametrize("precision", ("bf16", "bf16-autocast"))
def test_half_precision_resumes_bit_exactly_and_stays_near_fp32(
    precision: str, tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny(tiny_data, tmp_path / "fp32", kernels="plain"))
    train(tiny(tiny_data, tmp_path / "straight", precision=precision))
    train(tiny(tiny_data, tmp_path / "halves", precision=precision, stop_after=5))
    train(tiny(tiny_data, tmp_path / "halves", precision=precision, resume="auto"))
    last = "checkpoints/step-00000010/model.safetensors"
    assert sha256_of(tmp_path / "straight" / last) == sha256_of(tmp_path / "halves" / last)
    assert summary(tmp_path / "straight")["val_loss"] == pytest.approx(
        summary(tmp_path / "fp32")["val_loss"], rel=0.01
    )


def test_accumulated_gradients_equal_those_of_the_whole_batch(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path / "whole", kernels="plain"))
    train(tiny(tiny_data, tmp_path / "parts", kernels="plain", batch_size=2, accumulation_steps=2))
    whole, parts = (records(tmp_path / name) for name in ("whole", "parts"))
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-4)
    assert parts[-1]["tokens"] == whole[-1]["tokens"]


def test_epochs_count_passes_over_the_data(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path, max_steps=None, epochs=2, batch_size=32, eval_batches=1))
    manifest = json.loads((tiny_data / "train" / "manifest.json").read_text())
    assert summary(tmp_path)["steps"] == 2 * ((manifest["tokens"] - 1) // 32 // 32)


def test_resume_of_a_finished_run_changes_nothing(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert train(tiny(tiny_data, tmp_path, resume="auto")) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_signal_during_the_last_step_leaves_a_finished_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    take_step = session.Training.take_step

    def interrupted(run: session.Training) -> dict[str, Any]:
        if run.step == TINY["max_steps"] - 1:
            signal.raise_signal(signal.SIGINT)
        return take_step(run)

    monkeypatch.setattr(session.Training, "take_step", interrupted)
    assert train(tiny(tiny_data, tmp_path)) == 0
    assert summary(tmp_path)["steps"] == TINY["max_steps"]
    assert "go on with" not in capsys.readouterr().err


def test_peak_memory_of_earlier_sessions_counts(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.session.peak_memory_bytes", lambda device: 2_000)
    train(tiny(tiny_data, tmp_path))
    (tmp_path / "summary.json").unlink()
    monkeypatch.setattr("gpt.session.peak_memory_bytes", lambda device: 1_000)
    train(tiny(tiny_data, tmp_path, resume="auto"))
    assert summary(tmp_path)["peak_memory_bytes"] == 2_000


def test_validation_loss_that_is_no_number_is_not_kept(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.session.validation_loss", lambda *_: float("nan"))
    with pytest.raises(UserError, match="the val_loss became nan at step 5"):
        train(tiny(tiny_data, tmp_path))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert checkpoints(tmp_path) == ["step-00000004"]


def test_failing_first_step_leaves_no_metrics(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.session.validation_loss", lambda *_: float("inf"))
    with pytest.raises(UserError, match="the val_loss became inf at step 1"):
        train(tiny(tiny_data, tmp_path, eval_interval=1))
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()


def test_a_new_run_does_not_bury_an_old_one(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path, stop_after=1))
    with pytest.raises(UserError, match="already holds a run: continue it with --resume auto"):
        train(tiny(tiny_data, tmp_path))
    with pytest.raises(UserError, match=r"takes auto, none or the directory .* of a run, which latest is"):
        train(tiny(tiny_data, tmp_path, resume="latest"))


def test_two_trainings_do_not_write_into_one_directory(tiny_data: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        for resume in ("none", "auto"):
            with pytest.raises(UserError, match="another training is writing to"):
                train(tiny(tiny_data, tmp_path / "run", resume=resume))
        assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "run").exists()
    assert train(tiny(tiny_data, tmp_path / "run", max_steps=1)) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_layer": 3}, "n_layer was 2 and is 3 now"),
        ({"dropout": 0.5}, "dropout was 0.0 and is 0.5 now"),
        ({"kernels": "plain"}, "kernels was optimized and is plain now"),
        ({"precision": "bf16"}, "precision was fp32 and is bf16 now"),
        ({"seed": 5}, "seed was 1234 and is 5 now"),
    ],
)
def test_resume_names_the_setting_that_changed(
    changed: dict, message: str, tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny(tiny_data, tmp_path, stop_after=1))
    with pytest.raises(UserError, match=message):
        train(tiny(tiny_data, tmp_path, resume="auto", **changed))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def test_corrupt_newest_checkpoint_falls_back_to_the_one_before(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(tiny_data, tmp_path))
    root = tmp_path / "checkpoints"
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000010"]
    whole = sha256_of(root / "step-00000010" / "model.safetensors")
    flip_a_bit(root / "step-00000010" / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000010 is corrupt: model\.safetensors does not match"):
        train(tiny(tiny_data, tmp_path, resume=str(root / "step-00000010")))
    capsys.readouterr()
    train(tiny(tiny_data, tmp_path, resume="auto"))
    said = capsys.readouterr().err
    assert "warning: checkpoint" in said and "step-00000010 is corrupt" in said
    assert "resumed from" in said and "step-00000008" in said
    assert sha256_of(root / "step-00000010" / "model.safetensors") == whole
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))


def test_going_back_abandons_later_checkpoints(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path))
    earlier = tmp_path / "checkpoints" / "step-00000008"
    train(tiny(tiny_data, tmp_path, resume=str(earlier), stop_after=1))
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000009"]
    assert records(tmp_path)[-1]["step"] == 9 and summary(tmp_path)["steps"] == 9


@pytest.mark.parametrize("folder", [".", "checkpoints"])
def test_a_folder_of_checkpoints_stands_for_the_newest(folder: str, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path, stop_after=9))
    assert checkpoint.find(tmp_path / folder) == tmp_path / "checkpoints" / "step-00000009"
    train(tiny(tiny_data, tmp_path, resume=str(tmp_path / folder), stop_after=1))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))


def test_truncated_and_missing_files_are_corrupt_too(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path, stop_after=2))
    path = tmp_path / "checkpoints" / "step-00000002"
    state = (path / "state.json").read_bytes()
    (path / "state.json").write_bytes(state[:-5])
    with pytest.raises(UserError, match=r"state\.json does not match"):
        checkpoint.verify(path)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        checkpoint.verify(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        checkpoint.verify(path)
    with pytest.raises(UserError, match="no older one is whole"):
        checkpoint.newest(tmp_path / "checkpoints")
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000002 is incomplete: manifest\.json is missing"):
        train(tiny(tiny_data, tmp_path, resume=str(path)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no older one is whole"):
        train(tiny(tiny_data, tmp_path, resume="auto"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_tokenizer_of_other_data_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    outputs = {"tokenizer.json": {"sha256": sha256_of(data / "tokenizer.json")}}
    (data / "data_card.json").write_text(json.dumps({"outputs": outputs}))
    train(tiny(data, tmp_path / "right", max_steps=1))
    text = (data / "tokenizer.json").read_text()
    (data / "tokenizer.json").write_text(text + " ")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the one that data\.prepare made"):
        train(tiny(data, tmp_path / "wrong", max_steps=1))


def test_metrics_of_repeated_steps_are_dropped(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path, stop_after=4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 99.0}) + "\n" + '{"step": 6, "lo')
    train(tiny(tiny_data, tmp_path, resume="auto"))
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))
    assert all(record["loss"] < 99 for record in records(tmp_path))


@pytest.mark.slow
def test_compiled_run_agrees_with_eager(tiny_data: Path, tmp_path: Path) -> None:
    for compiled in (False, True):
        train(tiny(tiny_data, tmp_path / str(compiled), compile=compiled, max_steps=5))
    eager, compiled = ([record["loss"] for record in records(tmp_path / name)] for name in ("False", "True"))
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_can_start_from_the_weights_of_another(precision: str, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny(tiny_data, tmp_path / "first", precision=precision))
    options = {
        "precision": precision,
        "learning_rate": 1e-9,
        "max_steps": 1,
        "initialize_from": tmp_path / "first",
    }
    train(tiny(tiny_data, tmp_path / "second", **options))
    assert summary(tmp_path / "second")["val_loss"] == pytest.approx(summary(tmp_path / "first")["val_loss"])
    train(tiny(tiny_data, tmp_path / "second", **options | {"resume": "auto", "max_steps": 2}))
    with pytest.raises(UserError, match=r"--initialize-from .*: its n_embd is 32, that of this run is 64"):
        train(tiny(tiny_data, tmp_path / "third", **options | {"n_embd": 64}))
    assert not list(tmp_path.glob("third/*"))


def test_what_changed_at_a_resume_is_said(tiny_data: Path, tmp_path: Path, capsys) -> None:
    train(tiny(tiny_data, tmp_path, max_steps=4))
    train(tiny(tiny_data, tmp_path, max_steps=6, learning_rate=1e-4, warmup_steps=9, resume="auto"))
    said = capsys.readouterr().err
    assert "note: max_steps was 4 and is 6 from here on" in said
    assert "note: learning_rate was 0.001 and is 0.0001 from here on" in said
    assert "warning: the warmup of 9 steps does not end within the run (--warmup-steps)" in said
    assert "with --vocab-size 0" not in said


def test_a_model_of_far_more_ids_than_the_tokenizer_is_warned_of(
    tiny_data: Path, tmp_path: Path, capsys
) -> None:
    train(tiny(tiny_data, tmp_path, max_steps=1, warmup_steps=0, vocab_size=4000))
    assert "of 4,000 ids that the model has, the tokenizer has 3" in capsys.readouterr().err


def test_a_log_is_not_left_silent(tiny_data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Here after no time at all; where nobody looks the last line says which loss is which."""
    monkeypatch.setattr("gpt.progress.SECONDS_OF_SILENCE", 0.0)
    train(tiny(tiny_data, tmp_path))
    said = capsys.readouterr().err
    assert all(f"step {step}: loss " in said for step in range(1, 11))
    assert said.count("val loss") == 3 and "10 steps: train loss" in said and "(mean of the last 10)" in said
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("table", TABLES)
def test_validation_is_of_the_whole_validation_split_without_dropout(
    table: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Against plain PyTorch over the tokens of the shards, in order."""
    options = {"kernels": table, "dropout": 0.5, "batch_size": 1, "eval_batches": 1000}
    train(tiny(tiny_data, tmp_path, **options))
    model, _, _ = checkpoint.load_model(tmp_path, kernels="plain")
    tokens = torch.from_numpy(np.concatenate([*token_arrays(tiny_data / "val")]).astype(np.int64))
    windows = (len(tokens) - 1) // 32
    inputs, targets = tokens[: windows * 32].view(-1, 32), tokens[1 : windows * 32 + 1]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.logits(inputs).flatten(0, 1), targets).item()
    assert summary(tmp_path)["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert summary(tmp_path)["val_tokens"] == windows * 32


def test_best_validation_loss_is_the_lowest(tiny_data: Path, tmp_path: Path, monkeypatch) -> None:
    found = iter([3.0, 2.0, 5.0])
    monkeypatch.setattr("gpt.session.validation_loss", lambda *_: next(found))
    train(tiny(tiny_data, tmp_path, max_steps=15))
    assert summary(tmp_path)["best_val_loss"] == 2.0 and summary(tmp_path)["val_loss"] == 5.0
    (newest,) = (tmp_path / "checkpoints").glob("step-00000015")
    assert checkpoint.read_state(newest)["best_val_loss"] == 2.0


def test_a_validation_loss_that_rises_again_is_warned_of(
    tiny_data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    losses = iter([3.0, 2.0, 2.03])
    monkeypatch.setattr("gpt.session.validation_loss", lambda *_: next(losses))
    train(tiny(tiny_data, tmp_path, eval_interval=1, max_steps=3))
    said = " ".join(capsys.readouterr().err.split())
    assert "the validation loss was 2.0000 at step 2 and is 2.0300 now" in said
    assert "--max-steps 2 ends there" in said


def test_the_peak_of_a_busy_cpu_is_not_that_of_small_products(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(
        "gpt.hardware.time.perf_counter", lambda: next(clock)
    )  # a second passes at every look
    assert gemm_peak_flops(torch.device("cpu"), "fp32") == 2.0 * 1024**3


def test_first_steps_are_not_timed(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1.0, "tokens": i, "seconds": 1.0 * i, "val_loss": 2.0} for i in range(1, 6)]
    for line in lines:
        slow = line["step"] <= 3
        line |= {"tokens_per_second": 1.0 if slow else 100.0, "step_ms": 9.0 if slow else 3.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summarize(tmp_path / "metrics.jsonl", 5)
    assert found["tokens_per_second"] == 100.0 and found["step_ms_median"] == 3.0


def test_a_summary_needs_all_its_records(tiny_data: Path, tmp_path: Path) -> None:
    """As after a loss of power, which the checkpoint has survived and the last records have not."""
    train(tiny(tiny_data, tmp_path))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "summary.json").write_text("{")
    path.write_text("".join(lines[:6]))
    with pytest.raises(UserError, match=r"metrics\.jsonl ends at step 6, the run at 10"):
        train(tiny(tiny_data, tmp_path, resume="auto"))
    path.write_text("".join([*lines[:4], "garbage\n", *lines[4:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 5, is no record of a step"):
        train(tiny(tiny_data, tmp_path, resume="auto"))
    path.write_text("".join(lines))
    assert train(tiny(tiny_data, tmp_path, resume="auto")) == 0
    assert summary(tmp_path)["steps"] == 10


def test_a_run_is_not_resumed_on_other_validation_data_or_beyond_its_end(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    train(tiny(data, tmp_path / "run"))
    with pytest.raises(UserError, match="is at step 10, beyond the 5 of this run"):
        train(tiny(data, tmp_path / "run", resume="auto", max_steps=5))
    shutil.rmtree(data / "val")
    shutil.copytree(tiny_data / "test", data / "val")
    with pytest.raises(UserError, match="validation data was"):
        train(tiny(data, tmp_path / "run", resume="auto", max_steps=20))

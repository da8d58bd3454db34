"""Training by torchrun, two processes on CPUs: the losses of one process, cut anywhere, the same files."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gpt.generate import main as generate
from gpt.resume import launched_by, program_of, resume_command

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
SIZE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--warmup-steps", "2"]
OPTIONS = [*SIZE, "--threads", "1", "--device", "cpu", "--eval-interval", "3", "--eval-batches", "3"]


def command(data: Path, out: Path, *options: str, processes: int = 2) -> list[str]:
    """`options` end those that are the same in all runs; a step has 8 windows, of three processes 6."""
    batch = ["--batch-size", str(8 // processes), "--max-steps", "6"]
    torchrun = [*TORCHRUN[:-2], str(processes), TORCHRUN[-1]]
    start = torchrun if processes > 1 else [sys.executable]
    return [*start, "-m", "gpt.train", "--data", str(data), "--out", str(out), *OPTIONS, *batch, *options]


def run(*arguments: Any, **options: Any) -> str:
    """What a run that has to succeed says."""
    done = subprocess.run(
        command(*arguments, **options), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    return [
        record[name] for record in records for name in ("loss", "grad_norm", "val_loss") if name in record
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints/step-00000006/model.safetensors")


@pytest.fixture(scope="module")
def alone(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same steps in one process, clipped."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run(tiny_data, out, "--precision", "fp32", "--max-grad-norm", "0.5", processes=1)
    return out


@pytest.mark.parametrize(
    ("parallel", "kernels"),
    [("ddp", "optimized"), ("fsdp", "optimized"), pytest.param("fsdp", "plain", marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_does(
    parallel: str, kernels: str, alone: Path, tiny_data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    options = ["--precision", "fp32", "--max-grad-norm", "0.5", "--parallel", parallel, "--kernels", kernels]
    said = run(tiny_data, out, *options)
    assert said.count("6 of 256 tokens") == 1 and f"2 x {parallel}, " in said  # one of them speaks
    assert losses(out) == pytest.approx(losses(alone), rel=2e-5)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(out)[name], tensor, rtol=1e-4, atol=2e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["tokens"] == 6 * 256 and 0 < summary["mfu"] < 1
    reference = json.loads((alone / "summary.json").read_text())
    assert summary["val_bits_per_byte"] == pytest.approx(reference["val_bits_per_byte"], rel=2e-5)
    assert generate(["--checkpoint", str(out), "--prompt", "prices", "--max-new-tokens", "3"]) == 0


# Of two numbers the sum is the same in any order, of three it is not.
@pytest.mark.parametrize(
    ("parallel", "processes"),
    [
        pytest.param("ddp", 3, marks=pytest.mark.slow),
        pytest.param("fsdp", 3, marks=pytest.mark.slow),
        ("fsdp", 2),
    ],
)
def test_a_run_cut_in_two_ends_bit_for_bit_alike(
    parallel: str, processes: int, tiny_data: Path, tmp_path: Path
) -> None:
    """bf16 with masters, dropout, two forward passes a step."""
    options = ["--precision", "bf16", "--dropout", "0.2", "--accumulation-steps", "2", "--parallel", parallel]
    run(tiny_data, tmp_path / "whole", *options, processes=processes)
    run(tiny_data, tmp_path / "cut", *options, "--stop-after", "3", processes=processes)
    state = json.loads((tmp_path / "cut/checkpoints/step-00000003/state.json").read_text())
    assert len({generators["cpu"] for generators in state["generators"]}) == processes
    said = run(tiny_data, tmp_path / "cut", *options, "--resume", "auto", processes=processes)
    assert "resumed from" in said
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "cut")[name], tensor), name


def test_a_signal_to_torchrun_saves_and_another_number_of_processes_is_refused(
    tiny_data: Path, tmp_path: Path
):
    out = tmp_path / "run"
    options = ["--max-steps", "100000", "--checkpoint-interval", "1000000"]
    process = subprocess.Popen(
        command(tiny_data, out, *options), cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    while not (out / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and said.count("stopped after step") == 1, said
    again = [*command(tiny_data, out, *options), "--resume", "auto"]
    assert f"go on with: {shlex.join(again)}\n" in said
    (saved,) = (out / "checkpoints").glob("step-*")
    steps = int(saved.name.removeprefix("step-"))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == steps
    refused = subprocess.run(
        command(tiny_data, out, *options, "--batch-size", "4", "--resume", "auto", processes=1),
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode == 2 and "processes was 2 and is 1 now" in refused.stderr


def test_a_run_says_how_torchrun_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, options = tmp_path / "torchrun", ["--out", "my runs", "--resume", "auto"]
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    start = [str(script), "--nproc-per-node", "8", "-m", "gpt.train"]
    with subprocess.Popen([sys.executable, *start, *options], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()  # until then it has no arguments
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        told = [resume_command(launched_by(given), given) for given in (options, [*options, "--seed", "1"])]
        process.kill()
    assert told[0] == f"{shlex.join(start)} --out 'my runs' --resume auto"
    assert told[1] == "torchrun [as before] -m gpt.train --out 'my runs' --seed 1 --resume auto"
    monkeypatch.setattr(sys, "orig_argv", ["my env/bin/python", "-m", "gpt.train"])
    said = resume_command(program_of("gpt.train"), ["--resume=none"])
    assert said == "'my env/bin/python' -m gpt.train --resume auto"


def test_bad_input_ends_all_processes(tiny_data: Path, tmp_path: Path) -> None:
    """Rank 0 alone looks for the checkpoint; the other one waits for what it finds."""
    start = command(tiny_data, tmp_path / "run", "--resume", "nowhere")
    done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "which nowhere is not" in done.stderr
    assert not (tmp_path / "run").exists()

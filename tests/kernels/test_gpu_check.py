"""Every function of `make gpu-check` on a machine without a GPU, with a stub for the clock."""

import dataclasses
import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_peers
from benchmarks.subjects import BF16, SUBJECTS
from tapelm.testing import interpreted_triton

CPU = torch.device("cpu")
SMALL = {
    "attention": (1, 2, 1, 20, 16), "rope": (1, 2, 1, 5, 16), "linear_cross_entropy": (5, 16, 33),
}  # fmt: skip


def once(function: Callable[[], object], **options: object) -> float:
    function()
    return 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")
def test_every_launcher_is_predicted_and_measured() -> None:
    small = [dataclasses.replace(each, shipped=((BF16, each.odd[0]),)) for each in SUBJECTS if each.odd]
    with interpreted_triton():
        rows, left = gpu_check.predictions(CPU, math.inf, once, small)
        assert left == [] and [row["op"] for row in rows] == [each.launcher for each in small]
        late, left = gpu_check.predictions(CPU, 0.0, once, small[:1])
    assert late == [] and left == ["attention_forward 1x1x1x1x16"]
    assert all(row["measured_us"] == 2000.0 and 0 < row["predicted_us"] < 1e3 for row in rows)
    gpu_check.report_predictions(rows, None)


def test_every_op_is_measured_beside_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = [dataclasses.replace(t, shapes=(SMALL.get(t.op, (4, 32)),)) for t in gpu_peers.TASKS]
    rows, left = gpu_peers.measure(CPU, math.inf, once, tasks, compiled=lambda function: function)
    assert left == [] and len(rows) == len(tasks)
    for row in rows:
        assert (row["tapelm"], row["torch"], row["compile"]) == (2.0, 2.0, 2.0), row
        assert 0 < row["predicted_ms"] < 1
    assert gpu_peers.measure(CPU, 0.0, once, tasks[:1])[1] == ["attention 1x2x1x20x16"]
    gpu_peers.report(rows)
    assert "linear_cross_entropy" in capsys.readouterr().out


@pytest.mark.parametrize("task", gpu_peers.TASKS, ids=lambda task: task.op)
def test_peers_compute_what_the_op_does(task: gpu_peers.Task) -> None:
    if task.op == "dropout":
        pytest.skip("drops other elements than PyTorch")
    generator = torch.Generator().manual_seed(3)

    def make(shape: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if dtype == torch.int64:
            return torch.randint(0, 3, shape, generator=generator)
        return torch.randn(shape, generator=generator).to(BF16)

    inputs = task.inputs(make, *SMALL.get(task.op, (4, 32)))
    ours, theirs = (gpu_peers.forward_backward(f, inputs) for f in (task.ours, task.torch))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_a_peer_that_fails_is_reported_and_our_own_failure_is_not_hidden() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel image\nfor this device")

    assert gpu_peers.timed("liger", broken, once) == "RuntimeError: no kernel image"
    with pytest.raises(RuntimeError):
        gpu_peers.timed("tapelm", broken, once)


@pytest.mark.slow
def test_both_models_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    result = gpu_check.train(CPU, time.monotonic() + 300, "demo", 3)
    assert set(result["training"]) == {"plain", "optimized"} and result["trained_alike"]
    assert "tokens/s" in capsys.readouterr().out


def test_there_is_enough_text_to_train_on() -> None:
    documents = gpu_check.own_text()
    assert len(documents) > 100 and "DEFAULT" in "".join(documents)


def test_results_are_written_for_the_device(tmp_path: Path) -> None:
    path = gpu_check.write({"kernels": []}, CPU, tmp_path)
    assert json.loads(path.read_text())["machine"]["versions"]["torch"] == torch.__version__


def test_tests_that_hang_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "run", hangs)
    assert gpu_check.run_tests() == 124


@pytest.mark.parametrize("static", [0, 1])
def test_without_a_gpu_one_line_and_the_static_proofs(
    static: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=static))
    assert gpu_check.run() == static
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and "no GPU" in lines[0]


@pytest.mark.parametrize("tests,alike,status", [(0, True, 0), (3, True, 3), (0, False, 1)])
def test_with_a_gpu_everything_is_written_and_failures_count(
    tests: int, alike: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0))
    monkeypatch.setattr(gpu_check, "run_tests", lambda: tests)
    monkeypatch.setattr(
        gpu_check, "measure", lambda device, deadline: {"trained_alike": alike, "kernels": []}
    )
    monkeypatch.setattr(gpu_check, "write", lambda content, device, folder: written.append(content))
    assert gpu_check.run() == status
    assert written[0]["tests"] == tests and written[0]["seconds"] >= 0


def test_a_failed_training_does_not_lose_the_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise subprocess.CalledProcessError(2, "gpt.train")

    monkeypatch.setattr(gpu_check, "train", fails)
    monkeypatch.setattr(gpu_check, "predictions", lambda *a: ([], ["rope 1"]))
    monkeypatch.setattr(gpu_check.gpu_peers, "measure", lambda *a: ([], ["rope 2"]))
    monkeypatch.setattr(gpu_check.adamw, "cases", lambda device: [])
    content = gpu_check.measure(CPU, math.inf)
    assert content["left_out"] == ["rope 1", "rope 2"] and content["trained_alike"] is False

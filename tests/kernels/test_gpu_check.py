"""Every function of `make gpu-check` on a machine without a GPU, with a stub for the clock."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_check, gpu_kernels, gpu_parts, gpu_peers
from benchmarks.subjects import BF16, SUBJECTS, random
from tapelm.roofline import datasheet
from tapelm.testing import interpreted_triton

CPU = torch.device("cpu")
SMALL = {
    "attention": (1, 2, 1, 20, 16), "rope": (1, 2, 1, 5, 16), "linear_cross_entropy": (5, 16, 33),
}  # fmt: skip


def once(function: Callable[[], object], **options: object) -> float:
    function()
    return 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels")
def test_every_launcher_is_predicted_and_measured(tmp_path: Path) -> None:
    small = [dataclasses.replace(each, shipped=((BF16, each.odd[0]),)) for each in SUBJECTS if each.odd]
    units = gpu_kernels.kernels(CPU, once, small)
    with interpreted_triton():
        assert gpu_parts.take(units, math.inf, tmp_path / "rows", lambda: True) == 0
    rows = json.loads((tmp_path / "rows").read_text())
    assert [row["op"] for row in rows] == [each.launcher for each in small]
    assert all(row["measured_us"] == 2000.0 and 0 < row["predicted_us"] < 1e3 for row in rows)
    gpu_kernels.report(rows, None)
    gpu_parts.take(units[:1], -1.0, tmp_path / "rows", lambda: True)
    left = {"op": "attention_forward", "shape": "1x1x1x1x16", "left_out": True}
    assert json.loads((tmp_path / "rows").read_text()) == [left]


def small_tasks() -> list[gpu_peers.Task]:
    return [dataclasses.replace(t, shapes=(SMALL.get(t.op, (4, 32)),)) for t in gpu_peers.TASKS]


def test_every_op_is_measured_beside_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    units = gpu_peers.peers(CPU, once, small_tasks(), compiled=lambda function: function)
    rows = [gpu_parts.attempt(unit) for unit in units]
    assert [row["op"] for row in rows] == [task.op for task in gpu_peers.TASKS]
    for row in rows:
        assert (row["tapelm"], row["torch"], row["compile"]) == (2.0, 2.0, 2.0), row
        assert 0 < row["predicted_ms"] < 1
    gpu_peers.report(rows)
    assert "linear_cross_entropy" in capsys.readouterr().out


def test_every_shape_is_compiled_by_itself() -> None:
    """A second shape would make torch.compile write code for any."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.append([size for each in inputs if isinstance(each, torch.Tensor) for size in each.shape])
        return graph.forward

    task = next(task for task in gpu_peers.TASKS if task.op == "swiglu")
    task = dataclasses.replace(task, shapes=((8, 32), (16, 64)))
    compiled = partial(gpu_peers.compile_for_shape, backend=backend)
    assert not [
        row for unit in gpu_peers.peers(CPU, once, [task], compiled) for row in unit.run() if row == "error"
    ]
    assert seen == [[8, 32, 8, 32], [16, 64, 16, 64]] and all(type(n) is int for sizes in seen for n in sizes)


def test_random_ids_and_targets_are_of_the_whole_vocabulary() -> None:
    make = random(BF16)
    embedding = next(subject for subject in SUBJECTS if subject.launcher == "embedding_forward")
    ids = embedding.arguments(make, 8, 256, 10000, 4)[0]
    task = next(task for task in gpu_peers.TASKS if task.op == "linear_cross_entropy")
    targets = task.inputs(make, 2048, 4, 10000)[2]
    for drawn in (ids, targets):
        assert 0 <= drawn.min() < 100 and 9900 < drawn.max() < 10000 and len(drawn.unique()) > 1500


def test_first_shapes_come_first() -> None:
    shapes = [unit.shape for unit in gpu_peers.peers(CPU, once)]
    assert set(shapes[: len(gpu_peers.TASKS)]) == {
        "x".join(map(str, task.shapes[0])) for task in gpu_peers.TASKS
    }


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


def broken(*arguments: object, **options: object) -> None:
    raise RuntimeError("no kernel image\nfor this device")


def test_a_peer_that_fails_is_reported_in_its_place() -> None:
    assert gpu_peers.timed(broken, once) == "RuntimeError: no kernel image"
    unit = gpu_peers.peers(CPU, once, small_tasks()[1:2], compiled=lambda function: broken)[0]
    row = gpu_parts.attempt(unit)
    assert row["compile"] == "RuntimeError: no kernel image" and row["tapelm"] == 2.0 and "error" not in row


def test_our_own_error_and_our_wrong_result_are_in_the_row_and_fail_the_check() -> None:
    norm = small_tasks()[2]

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return norm.torch(x, weight) * 1.1

    for ours, told in ((broken, "RuntimeError: no kernel image"), (wrong, "wrong: result 0: largest error")):
        unit = gpu_peers.peers(CPU, once, [dataclasses.replace(norm, ours=ours)], lambda function: function)[
            0
        ]
        row = gpu_parts.attempt(unit)
        assert row["error"].startswith(told) and "tapelm" not in row
        gpu_peers.report([row])
        assert gpu_check.failures({"peers": [row], "trained_alike": True}) == [
            f"rms_norm 4x32: {row['error']}"
        ]


@pytest.mark.parametrize("end", ["error", "unusable", "death", "hang"])
def test_other_rows_are_measured_whatever_becomes_of_one(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ends, or has to, is followed by one that begins behind its last row."""
    starts = []

    def second() -> dict:
        if end in ("error", "unusable"):
            raise RuntimeError("an illegal memory access was encountered")
        raise SystemExit

    runs = [lambda: {"n": 0}, second, lambda: {"n": 2}]
    units = [gpu_parts.Unit("op", str(index), run) for index, run in enumerate(runs)]

    def process(command: list[str], seconds: float) -> int | None:
        starts.append(int(command[4]))
        try:
            return gpu_parts.take(units[starts[-1] :], math.inf, Path(command[6]), lambda: end == "error")
        except SystemExit:
            return None if end == "hang" else -11

    monkeypatch.setattr(gpu_parts, "finish", process)
    rows = gpu_parts.measure("kernels", time.monotonic() + 100)
    told = {"death": "no result: its process ended with status -11", "hang": "no result: it took too long"}
    expected = told.get(end, "RuntimeError: an illegal memory access was encountered")
    assert rows[:2] == [{"op": "op", "shape": "0", "n": 0}, {"op": "op", "shape": "1", "error": expected}]
    assert rows[2:] == [{"op": "op", "shape": "2", "n": 2}]
    assert starts == ([0] if end == "error" else [0, 2])


def test_what_is_behind_a_row_that_took_all_the_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [gpu_parts.Unit("op", str(index), lambda: {"n": 1}) for index in range(4)]

    def process(command: list[str], seconds: float) -> int | None:
        first, left, path = int(command[4]), float(command[5]), Path(command[6])
        if first == 0:
            gpu_parts.take(units[:1], math.inf, path, lambda: True)
            time.sleep(0.3)
            found = json.loads(path.read_text())
            path.write_text(json.dumps([*found, {"op": "op", "shape": "1", "error": gpu_parts.UNFINISHED}]))
            return None
        return gpu_parts.take(units[first:], left, path, lambda: True)

    monkeypatch.setattr(gpu_parts, "finish", process)
    rows = gpu_parts.measure("kernels", time.monotonic() + 0.2)
    assert [row.get("left_out", False) for row in rows] == [False, False, True, True]
    assert rows[1]["error"] == "no result: it took too long"


def test_a_part_that_cannot_begin_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_parts, "finish", lambda command, seconds: 1)
    (row,) = gpu_parts.measure("peers", time.monotonic() + 100)
    assert row["error"] == "nothing was measured, status 1"


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/child; wait"
    assert gpu_parts.finish(["sh", "-c", script], 1.0) is None
    stat = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline = time.monotonic() + 20
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    assert gpu_parts.finish(["sh", "-c", "exit 3"], 20.0) == 3


def test_kernels_are_compiled_ahead_into_the_cache(tmp_path: Path) -> None:
    index = next(i for i, subject in enumerate(SUBJECTS) if subject.launcher == "dropout")
    script = f"""
import math, torch
from benchmarks.gpu_kernels import compile_one
print(repr(compile_one(("sm_90", math.inf, {index}, torch.bfloat16, (256, 512)))))
print(repr(compile_one(("sm_90", math.inf, {index}, torch.bfloat16, ("none",)))))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "''" and "dropout none torch.bfloat16: TypeError" in second
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"), ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"), ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200 SXM"), ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA B200", "B200"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None), ("NVIDIA H800", None), ("NVIDIA GeForce RTX 5090", None),
    ],
)  # fmt: skip
def test_ceilings_are_those_of_the_product(
    name: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = datasheet(torch.device("cuda"))
    assert (device.name if device else None) == found


@pytest.mark.slow
def test_both_models_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    result = gpu_check.train(CPU, time.monotonic() + 300, "demo", 3)
    assert set(result["training"]) == {"plain", "optimized"} and result["trained_alike"]
    assert "tokens/s" in capsys.readouterr().out


def test_there_is_enough_text_to_train_on() -> None:
    documents = gpu_check.own_text()
    assert len(documents) > 100 and "DEFAULT" in "".join(documents)


def test_a_second_run_of_a_day_has_a_file_of_its_own(tmp_path: Path) -> None:
    first = gpu_check.free_path(CPU, tmp_path)
    assert not first.exists() and gpu_check.free_path(CPU, tmp_path) == first
    first.write_text("")
    second = gpu_check.free_path(CPU, tmp_path)
    second.write_text("")
    assert second.stem == f"{first.stem}-2" and gpu_check.free_path(CPU, tmp_path).stem == f"{first.stem}-3"


def test_tests_that_hang_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "finish", lambda command, seconds: None)
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


@pytest.mark.parametrize(
    ("tests", "alike", "error", "status"),
    [(0, True, {}, 0), (3, True, {}, 3), (0, False, {}, 1), (0, True, {"error": "misaligned address"}, 1)],
)
def test_with_a_gpu_everything_is_written_and_failures_count(
    tests: int, alike: bool, error: dict, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every part there is a file with what was found until then."""
    written = []

    def part(name: str, deadline: float) -> list[dict]:
        written.append(json.loads(next(tmp_path.glob("*.json")).read_text()))
        late = {"op": "rope", "shape": name, "left_out": True}
        return [{"op": "rope", "shape": "1", "measured_us": 1.0, **error}, late]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "finish", lambda command, seconds: 0)
    monkeypatch.setattr(gpu_check, "run_tests", lambda: tests)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    for name in ("device_name", "architecture", "datasheet", "fingerprint"):
        found = getattr(gpu_check, name)(CPU)
        monkeypatch.setattr(gpu_check, name, lambda device, found=found: found)
    monkeypatch.setattr(gpu_check.harness, "report", lambda *a: None)
    monkeypatch.setattr(gpu_check.gpu_parts, "measure", part)
    monkeypatch.setattr(gpu_check, "train", lambda *a: {"trained_alike": alike})
    assert gpu_check.run() == status
    assert [sorted(gpu_check.RESERVED.keys() & each.keys()) for each in written] == [
        [], ["kernels"], ["kernels", "peers"]
    ]  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["tests"] == tests and content["seconds"] >= 0 and content["trained_alike"] is alike
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert content["left_out"] == [f"rope {name}" for name in gpu_check.RESERVED]


def test_a_failed_training_does_not_lose_the_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    content: dict = {}
    monkeypatch.setattr(gpu_check.gpu_parts, "measure", lambda *a: [])
    monkeypatch.setattr(gpu_check, "own_text", list)
    monkeypatch.setattr(gpu_check, "finish", lambda command, seconds: 2)
    gpu_check.measure(CPU, math.inf, content.update)
    assert content["kernels"] == [] and content["trained_alike"] is False
    (line,) = gpu_check.failures(content)
    assert line.startswith("training: CalledProcessError") and "status 2" in line

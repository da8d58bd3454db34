"""`python -m benchmarks tune` without a GPU: what it asks, prunes, selects and writes, by a stub timer."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import tune
from benchmarks.subjects import FP32, SUBJECTS, Subject
from benchmarks.tune import Choice, OnDevice, Question, fastest, neighbours
from gpt.cli import UserError
from tapelm import _norm_launches, _tuning
from tapelm._attention_configs import launch_config
from tapelm._library import CUDA_LAUNCHERS, RELATIVES, assumed_architecture
from tapelm.lora_linear import tile_config
from tapelm.testing import interpreted_triton

ROOT = Path(__file__).parents[2]
SWIGLU = Choice("swiglu_forward", "4")
TILE = {"BLOCK": 2048, "num_warps": 4}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(autouse=True)
def no_tables_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "_tables", {})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[Choice, Question]:
    """One subject of a size that the interpreter runs, and what is asked about it."""
    subject = next(each for each in SUBJECTS if each.launcher == "swiglu_forward")
    shipped = Subject(subject.launcher, subject.arguments, ((FP32, (4, 1024)), (FP32, (3, 100))), ())
    monkeypatch.setattr(tune, "SUBJECTS", (shipped,))
    asked = {SWIGLU: Question(dict(TILE), [(0, 0), (0, 1)])}
    monkeypatch.setattr(tune, "questions", lambda target: asked)
    return asked


def by_block(seconds: dict[int, float]) -> Callable[..., float]:
    return lambda choice, config, use: seconds.get(config["BLOCK"], 1.0)


def all_clean(tasks: list) -> list[bool]:
    return [True] * len(tasks)


def test_neighbours_differ_in_one_or_two_parameters_within_limits() -> None:
    found = neighbours({"BLOCK_R": 1, "num_warps": 16, "num_stages": 1})
    assert {"BLOCK_R": 2, "num_warps": 16, "num_stages": 1} in found
    assert {"BLOCK_R": 2, "num_warps": 8, "num_stages": 1} in found
    assert all(c["BLOCK_R"] >= 1 and c["num_warps"] <= 16 and 1 <= c["num_stages"] <= 5 for c in found)
    assert len(found) == 3 + 3 and len({str(config) for config in found}) == len(found)


def test_the_fastest_over_all_uses_wins() -> None:
    question = Question(dict(TILE), [(0, 0), (0, 1)])
    # 1024 is 4x faster for one use and 8x slower for the other; 4096 is 1.5x faster for both.
    seconds = {1024: (0.25, 8.0), 4096: (2 / 3, 2 / 3)}

    def timer(choice: Choice, config: dict, use: tuple[int, int]) -> float:
        return seconds.get(config["BLOCK"], (1.0, 1.0))[use[1]]

    config, gained = fastest(SWIGLU, question, neighbours(TILE), timer)
    assert config["BLOCK"] == 4096 and gained == pytest.approx(1.5)


def test_wrong_results_never_win() -> None:
    question, wrong = Question(dict(TILE), [(0, 0)]), {**TILE, "BLOCK": 4096}
    assert fastest(SWIGLU, question, [wrong], by_block({4096: math.inf})) == (wrong, 0.0)
    assert fastest(SWIGLU, Question(dict(TILE), [(0, 0)]), [], lambda *a: 1.0) == (TILE, 1.0)


def test_small_gains_and_pruned_candidates_are_left_out(small: dict[Choice, Question]) -> None:
    assert tune.tune("sm_80", "", 9e9, by_block({4096: 0.98}), all_clean, print) == {}
    timer = by_block({4096: 0.5, 1024: 0.7})
    pruned = tune.tune(
        "sm_80", "swiglu", 9e9, timer, lambda tasks: [t[2]["BLOCK"] != 4096 for t in tasks], print
    )
    assert pruned[SWIGLU]["BLOCK"] == 1024
    with pytest.raises(UserError, match="nothing"):
        tune.tune("sm_80", "nothing", 9e9, by_block({}), all_clean, print)
    assert tune.tune("sm_80", "", -1.0, by_block({4096: 0.5}), all_clean, print) == {}


def test_the_library_takes_the_table_that_was_written(small: dict[Choice, Question], tmp_path: Path) -> None:
    entries = tune.tune("sm_80", "", 9e9, by_block({4096: 0.5}), all_clean, print)
    path = tmp_path / "tuned" / "sm_80.json"
    tune.write_table(path, "sm_80", entries, torch.device("cpu"))
    assert json.loads(path.read_text())["configs"]["swiglu_forward"]["4"]["BLOCK"] == 4096
    device = torch.device("cpu")  # counts as sm_80
    assert _tuning.choose("swiglu_forward", device, (4,), TILE) == TILE
    _tuning.use_table(path)
    assert _tuning.choose("swiglu_forward", device, (4,), TILE)["BLOCK"] == 4096
    assert _tuning.choose("swiglu_forward", device, (2,), TILE) == TILE


def test_what_was_found_is_saved_before_a_later_choice_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    later = Choice("swiglu_forward", "2")
    asked = {SWIGLU: Question(dict(TILE), [(0, 0)]), later: Question(dict(TILE), [(0, 0)])}
    monkeypatch.setattr(tune, "questions", lambda target: asked)
    saved = []

    def timer(choice: Choice, config: dict, use: tuple[int, int]) -> float:
        if choice == later:
            raise RuntimeError("an illegal memory access was encountered")
        return 0.5 if config["BLOCK"] == 4096 else 1.0

    with pytest.raises(RuntimeError):
        tune.tune("sm_80", "", 9e9, timer, all_clean, lambda entries: saved.append(dict(entries)))
    assert [list(each) for each in saved] == [[SWIGLU]]


@pytest.mark.parametrize("poisoned", [False, True])
def test_a_candidate_that_cannot_be_launched_is_infinitely_slow(
    poisoned: bool, small: dict[Choice, Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tune.CUDA_LAUNCHERS, "swiglu_forward", lambda *arguments: torch.ones(1))
    monkeypatch.setattr(tune, "usable", lambda device: not poisoned)
    errors = iter([OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("Triton Error [CUDA]: 1")])

    def bench(launch: Callable, **options: object) -> float:
        raise next(errors)

    timer = OnDevice(torch.device("cpu"), bench)
    for block in (512, 1024):
        candidate = {**TILE, "BLOCK": block}
        if poisoned:
            with pytest.raises((RuntimeError, OutOfResources)):
                timer(SWIGLU, candidate, (0, 0))
        else:
            assert timer(SWIGLU, candidate, (0, 0)) == math.inf
            assert timer(SWIGLU, candidate, (0, 0)) == math.inf  # which is not tried again


def test_a_committed_table_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "FOLDER", tmp_path)
    tune.write_table(tmp_path / "sm_80.json", "sm_80", {SWIGLU: {**TILE, "BLOCK": 512}}, torch.device("cpu"))
    assert _tuning.choose("swiglu_forward", torch.device("cpu"), (4,), TILE)["BLOCK"] == 512


@pytest.mark.parametrize(
    "text", ["", "[]", '{"configs": {}}', '{"architecture": "sm_80", "configs": {"a": {"b": 3}}}']
)
def test_a_damaged_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table"):
        _tuning.use_table(path)


def test_a_table_of_other_parameters_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    tune.write_table(path, "sm_80", {SWIGLU: {"BLOCK_X": 2}}, torch.device("cpu"))
    _tuning.use_table(path)
    with pytest.raises(ValueError, match="BLOCK_X"):
        _tuning.choose("swiglu_forward", torch.device("cpu"), (4,), TILE)


@without_gpu
def test_the_timer_runs_a_candidate_and_compares_its_results(
    small: dict[Choice, Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device of the interpreter, with a stub for the clock."""
    module = importlib.import_module("tapelm.swiglu")
    launched = []
    kernel = module.swiglu_forward_kernel

    class Spy:
        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            def launch(
                gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, *rest: int, **tile: int
            ) -> None:
                launched.append(tile["BLOCK"])
                kernel[grid](gate, up, y, *rest, **tile)
                if tile["BLOCK"] == 512:  # a wrong result
                    y.view(-1)[3] += 1

            return launch

    monkeypatch.setattr(module, "swiglu_forward_kernel", Spy())
    with interpreted_triton():
        timer = OnDevice(torch.device("cpu"), bench=lambda launch, **options: (launch(), 7.0)[1])
        assert timer(SWIGLU, {"BLOCK": 1024, "num_warps": 4}, (0, 0)) == pytest.approx(7e-3)
        assert launched == [2048, 1024, 1024]
        assert timer(SWIGLU, {"BLOCK": 512, "num_warps": 4}, (0, 0)) == math.inf
        assert timer(SWIGLU, {"BLOCK": 512, "num_warps": 4}, (0, 1)) == math.inf


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run("-m", "benchmarks", "tune")
    assert done.returncode == 2
    lines = (done.stdout + done.stderr).strip().splitlines()
    assert len(lines) == 1 and "no GPU" in lines[0]


def test_every_kernel_with_a_choice_is_asked_and_spills_are_pruned() -> None:
    pytest.importorskip("triton.backends.nvidia")
    script = """
from benchmarks.tune import Choice, keeps_the_rules, questions
asked = questions("sm_80")
print(sorted({choice.kernel for choice in asked}))
choice = Choice("attention_forward", "2 128 False False")
print(asked[choice].shipped)
for config in ((128, 64, 8, 2), (128, 128, 4, 3)):
    config = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), config))
    print(keeps_the_rules(("sm_80", choice, config, asked[choice].uses[:1])))
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    kernels, shipped, good, spilling = done.stdout.strip().splitlines()
    for kernel in (
        "attention_forward", "attention_keys", "attention_queries", "bias_gelu_backward", "bias_gelu_forward",
        "cross_entropy", "dropout", "norm_backward", "norm_forward", "norm_weights", "rope",
        "swiglu_backward", "swiglu_forward", "wide_norm_backward", "wide_norm_forward",
    ):  # fmt: skip
        assert repr(kernel) in kernels
    assert "128" in shipped and (good, spilling) == ("True", "False")


@pytest.mark.parametrize(("name", "relative"), RELATIVES.items())
def test_gpus_without_configurations_take_those_of_a_relative_in_every_op(
    name: str, relative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = {"__getitem__": lambda self, grid: lambda *arguments, **tile: None}
    monkeypatch.setattr(_norm_launches, "norm_forward_kernel", type("Stub", (), launches)())

    def configurations(architecture: str) -> tuple:
        device = torch.device("cpu")
        with assumed_architecture(architecture), _tuning.asked() as choices:
            for kernel in ("forward", "keys", "queries"):
                launch_config(kernel, device, 2, 128, False, False)
            tiles = [tile_config(device, 2, backward) for backward in (False, True)]
            CUDA_LAUNCHERS["rms_norm_forward"](torch.empty(4, 1024), torch.empty(1024), 1e-5)
            return dict(choices), tiles

    assert configurations(name) == configurations(relative)

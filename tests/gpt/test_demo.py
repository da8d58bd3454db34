"""The demo's stages: what is skipped, what is resumed, what is done again."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from rich.console import Console

import gpt.demo
from gpt.cli import UserError
from gpt.config import parse_command_line
from gpt.demo import DemoConfig, Stage, code_sha256, stages_after_data
from gpt.evaluate import EvaluateConfig
from gpt.generate import GenerateConfig
from gpt.report import ReportConfig


def test_every_stage_passes_options_its_program_knows(tmp_path: Path) -> None:
    config = DemoConfig(out=tmp_path, max_steps=3, threads=1)
    parsers = {
        "gpt.train": parse_command_line,
        "gpt.evaluate": lambda arguments: tyro.cli(EvaluateConfig, args=arguments),
        "gpt.generate": lambda arguments: tyro.cli(GenerateConfig, args=arguments),
        "gpt.report": lambda arguments: tyro.cli(ReportConfig, args=arguments),
    }
    stages = stages_after_data(config, tmp_path / "data")
    parsed = {stage.name: parsers[stage.module](stage.arguments) for stage in stages}
    plain, optimized = parsed["train-plain"], parsed["train-optimized"]
    assert plain.max_steps == 3 and plain.resume == "auto" and plain.threads == 1
    assert dataclasses.replace(plain, kernels="optimized", out=optimized.out) == optimized
    assert list(parsed)[:2] == ["train-plain", "train-optimized"] and list(parsed)[-1] == "report"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "input").write_text("one")
    output = tmp_path / "run" / "output"
    return Stage("name", "module", ["--a"], [tmp_path / "input"], output, restart=output.parent)


def test_stage_runs_again_only_when_something_changed(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def succeed(command: list[str]) -> int:
        commands.append(command)
        stage.output.parent.mkdir(exist_ok=True)
        stage.output.write_text("done")
        return 0

    monkeypatch.setattr(gpt.demo, "run_to_end", succeed)
    console = Console(quiet=True)
    stage.run(tmp_path, console, force=False)
    stage.run(tmp_path, console, force=False)
    assert commands == [[sys.executable, "-m", "module", "--a"]]
    stage.output.unlink()
    stage.run(tmp_path, console, force=False)
    assert len(commands) == 2
    (tmp_path / "input").write_text("two")
    stage.run(tmp_path, console, force=False)
    assert len(commands) == 3
    stage.run(tmp_path, console, force=True)
    assert len(commands) == 4
    dataclasses.replace(stage, settings="other").run(tmp_path, console, force=False)
    assert len(commands) == 5


def test_interrupted_stage_keeps_its_files_until_the_settings_change(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = stage.output.parent / "checkpoint"
    seen = []

    def interrupted(command: list[str]) -> int:
        seen.append(partial.exists())
        partial.parent.mkdir(exist_ok=True)
        partial.write_text("half")
        return 130

    monkeypatch.setattr(gpt.demo, "run_to_end", interrupted)
    for changed in (stage, stage, dataclasses.replace(stage, settings="other")):
        with pytest.raises(SystemExit) as ended:
            changed.run(tmp_path, Console(quiet=True), force=False)
        assert ended.value.code == 130
    assert seen == [False, True, False]


def test_foreign_files_are_not_removed(stage: Stage, tmp_path: Path) -> None:
    kept = stage.output.parent / "thesis"
    kept.parent.mkdir()
    kept.write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="choose another --out"):
            stage.run(tmp_path, Console(quiet=True), force=force)
    assert kept.read_text() == "years of work"


def test_results_depend_on_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_sha256() == code_sha256()
    keys = []
    for code in ("one", "two"):
        monkeypatch.setattr(gpt.demo, "code_sha256", lambda code=code: code)
        stages = stages_after_data(DemoConfig(out=tmp_path), tmp_path)
        keys.append({stage.name: dataclasses.replace(stage, inputs=[]).key() for stage in stages})
    assert [name for name in keys[0] if keys[0][name] == keys[1][name]] == ["report"]


@pytest.mark.parametrize("bad", [["--max-steps", "0"], ["--threads", "5000"], ["--preset", "nosuch"]])
def test_bad_options_remove_nothing(bad: list[str], tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "train-plain.json").write_text('{"key": "old", "done": true, "seconds": 1.0}')
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "summary.json").write_text("{}")
    with pytest.raises(UserError):
        gpt.demo.main(["--out", str(tmp_path), "--data", str(tmp_path / "data"), *bad])
    assert (tmp_path / "plain" / "summary.json").is_file()


@pytest.mark.slow
def test_whole_demo_on_a_tiny_corpus(tiny_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt.demo", "--out", str(tmp_path), "--data", str(tiny_data)]
    command += ["--max-steps", "3", "--max-new-tokens", "5", "--threads", "1"]
    root = Path(__file__).resolve().parents[2]
    first = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["same_batches"] and (tmp_path / "report.html").is_file()
    assert "tokens/s" in first.stdout
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert again.stderr.count("done before") == 6 and "tokens/s" in again.stdout

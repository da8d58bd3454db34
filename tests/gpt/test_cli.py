"""How programs end, and how files are replaced."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from rich.table import Table

from gpt import interrupt
from gpt.cli import UserError, parse_options, prepare_output, print_titled, run_program, write_atomically
from gpt.hardware import pick_device, set_threads

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(arguments: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("wrong\n thing"), 2, "error: wrong thing\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "error: No space left on device: a/b\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (MemoryError("2 TB"), 1, "error: out of memory, make the model or the batch smaller: 2 TB\n"),
    ],
)
def test_expected_errors_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_program(raising(error))
    assert ended.value.code == status and capsys.readouterr().err == line


PROGRAMS = sorted(
    f"{path.parent.name}.{path.stem}"
    for folder in ("gpt", "data", "llama_lora")
    for path in (ROOT / folder).glob("*.py")
    if re.search(
        r'^if __name__ == "__main__":\n    (run_program\(main\)|main\(\))$', path.read_text(), re.MULTILINE
    )
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_watch_for_ctrl_c_before_they_import(program: str) -> None:
    assert {"gpt.train", "data.prepare", "llama_lora.finetune"} < set(PROGRAMS)
    text = (ROOT / f"{program.replace('.', '/')}.py").read_text()
    first = text.index("import", text.index("from __future__ import annotations") + 30)
    assert text[first:].startswith("import end_quietly\n\n    end_quietly()\n")


@pytest.mark.parametrize("program", ["gpt.train", "data.prepare", "llama_lora.finetune"])
def test_ctrl_c_during_the_imports_is_one_line(program: str) -> None:
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", program],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while "numpy" not in (line := process.stderr.readline()):
            assert line.startswith("import time:"), line
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, lines) == (130, "", ["error: interrupted"])


def test_after_the_imports_ctrl_c_raises() -> None:
    """And where a shell has it ignored, it stays ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.default_int_handler, signal.SIG_IGN):
            signal.signal(signal.SIGINT, handler)
            interrupt.end_quietly()
            with pytest.raises(SystemExit):
                run_program(lambda _: 0)
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("bug", (ZeroDivisionError(), RuntimeError("shapes differ")))
def test_bugs_keep_their_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        run_program(raising(bug))


def test_a_title_is_one_line_above_a_narrow_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_column("a")
    print_titled("val of [runs] " + "x" * 200, table)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "val of [runs] " + "x" * 200 and max(map(len, said[1:])) == 5


def test_memory_that_pytorch_cannot_have_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str]) -> int:
        torch.empty(1 << 50)
        return 0

    with pytest.raises(SystemExit) as ended:
        run_program(main)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: out of memory") and said.count("\n") == 1


@dataclasses.dataclass
class Program:
    """A program."""

    out: Path
    """Where the result goes, in so many words that tyro breaks the line where the terminal is narrow."""
    steps: int | None = None
    kind: Literal["plain", "optimized"] = "plain"


@pytest.mark.parametrize("columns", ("40", "200"))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out PATH"),
        (["--out"], "'--out'"),
        (["--out", "o", "--nonsense", "3"], "--nonsense"),
        (["--out", "o", "--step", "3"], "--step"),
        (["--out", "o", "stray"], "stray"),
        (["--out", "o", "--steps", "3a"], "--steps: expected a whole number, got '3a'"),
        (["--out", "o", "--kind", "x"], "'plain', 'optimized'"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], message: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as raised:
        parse_options(Program, arguments, prog="python -m program")
    said = str(raised.value)
    assert message in said and said.endswith("; for all options: python -m program --help")
    assert said.isascii() and "\n" not in said and "  " not in said


def test_right_options_and_help_are_tyros(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_options(Program, ["--out", "o", "--steps", "3"], prog="p") == Program(Path("o"), 3)
    with pytest.raises(SystemExit) as ended:
        parse_options(Program, ["--help"], prog="p")
    assert ended.value.code == 0 and "Where the result goes" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    prepare_output(tmp_path / "a" / "b" / "result.json")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "a", tmp_path / "file" / "result.json", tmp_path / "file" / "x" / "result.json"):
        with pytest.raises(UserError, match="cannot write"):
            prepare_output(path)
    with pytest.raises(UserError, match="cannot write /dev/null: it is no regular file"):
        prepare_output(Path("/dev/null"))


@pytest.mark.parametrize("name", ("meta", "cuda:x", "cpu:1", "cuda:-1", "cuda:99", "cuda:999", "CPU", ""))
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="device"):
        pick_device(name)


def test_threads_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="--threads must not be negative, got -1"):
        set_threads(-1)
    with pytest.raises(UserError, match="--threads must be at most 1024, got 1025"):
        set_threads(1025)


@pytest.mark.parametrize(
    "module",
    [
        "gpt.demo", "gpt.evaluate", "gpt.export", "gpt.generate", "gpt.predict", "gpt.report", "gpt.train",
        "llama_lora.finetune", "llama_lora.generate", "llama_lora.merge",
    ],
)  # fmt: skip
def test_help_explains_the_program_and_every_option(module: str, capsys) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    said = capsys.readouterr().out
    assert "Options of `python" not in said
    bare = re.findall(r"--([a-z0-9-]+) \S+ *(?:│\n│ *)?\((?:default|required)", said)
    assert bare == []

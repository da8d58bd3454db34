"""How programs end, and how files are replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt.cli import UserError, prepare_output, run_program, write_atomically
from gpt.hardware import pick_device, set_threads


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
    ],
)
def test_expected_errors_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_program(raising(error))
    assert ended.value.code == status and capsys.readouterr().err == line


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_program(raising(ZeroDivisionError()))


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


@pytest.mark.parametrize("name", ("meta", "cuda:x", "cpu:1", "cuda:-1", "cuda:99", "cuda:999", "CPU", ""))
def test_devices_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="device"):
        pick_device(name)


def test_negative_threads_are_refused() -> None:
    with pytest.raises(UserError, match="--threads must not be negative, got -1"):
        set_threads(-1)

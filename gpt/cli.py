"""How the programs of this package end when something goes wrong: one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console


class UserError(Exception):
    """Something the user can put right; the message says what and how, in one line."""


def run_program(main: Callable[[list[str]], int]) -> None:
    """Run `main(argv)` and exit with its status.

    UserError exits 2 and an operating-system error (a full disk, a missing file) exits 1, each with one
    `error:` line; Ctrl-C outside a training step exits 130. Anything else is a bug and keeps its traceback.
    """
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status = _complain(str(error), 2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        status = _complain(f"{error.strerror or error}{where}", 1)
    except KeyboardInterrupt:
        status = _complain("interrupted", 130)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a note to stop after this step; a second one acts as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


def prepare_output(path: Path) -> None:
    """Create the folder of a file that is written at the end, before the work that it would cost.

    Raises UserError when no file can be there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: {error.filename} is not a directory") from error
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary sibling and a rename, so that a failure leaves the old file."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables to keep their columns."""
    console = Console()
    return console if console.is_terminal else Console(width=130)

"""How the programs of this package end when something goes wrong: one line and an exit status."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from gpt import interrupt

Options = TypeVar("Options")
# What PyTorch's RuntimeErrors say: on CPUs, on GPUs, and of sizes that no memory has.
OUT_OF_MEMORY = r"can't allocate memory|out of memory|[Ss]torage size calculation overflowed"
# What tyro says of an option that may also be left out, and what it calls the kinds of values.
NO_SUCH_TYPE = re.compile(r"no type matching \{None\}\|(.*?) could be instantiated from \[(.*?)\]")
KINDS = {"YYYY-MM-DD": "a date as YYYY-MM-DD", "INT": "a whole number", "FLOAT": "a number"}


class UserError(Exception):
    """Something the user can put right; the message says what and how, in one line."""


def run_program(main: Callable[[list[str]], int]) -> None:
    """Run `main(argv)` and exit with its status.

    UserError exits 2 and an operating-system error (a full disk, a missing file) exits 1, each with one
    `error:` line, as does memory that cannot be had; Ctrl-C outside a training step exits 130. Anything else
    is a bug and keeps its traceback.
    """
    try:
        interrupt.raise_again()
        status = main(sys.argv[1:])
    except UserError as error:
        status = _complain(str(error), 2)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        status = _complain(f"{error.strerror or error}{where}", 1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        status = _complain(f"out of memory, make the model or the batch smaller: {str(error)[:200]}", 1)
    except KeyboardInterrupt:
        status = _complain("interrupted", 130)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


def parse_options(
    kind: type[Options],
    arguments: list[str],
    *,
    prog: str,
    default: Any = None,
    description: str | None = None,
) -> Options:
    """tyro's reading of `arguments`, its box about a wrong one turned into a UserError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            given = {} if default is None else {"default": default}
            return tyro.cli(kind, args=arguments, prog=prog, description=description, **given)
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UserError(f"{_without_box(said.getvalue())}; for all options: {prog} --help") from None


def _without_box(message: str) -> str:
    """The text in a box that tyro draws, without explanations of an option, up to the first blank line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    lines = [line.strip("│ ") for line in plain.splitlines() if not line.startswith(("╭", "╰"))]
    sections = re.split(r"\n─+\n", "\n".join(lines))
    told = [text for text in sections if not text.startswith(("For full help", "Argument help"))]
    message = " ".join("; ".join(text.split("\n\n")[0] for text in told).split()).rstrip(".")
    return NO_SUCH_TYPE.sub(
        lambda match: f"expected {KINDS.get(match[1], match[1])}, got {match[2]}", message
    )


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
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is {'a directory' if path.is_dir() else 'no regular file'}")
    prepare_folder(path)


def prepare_folder(path: Path) -> None:
    """Create the folder that `path` will be in. Raises UserError when nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write {path}: {error.filename} is not a directory") from error
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Create `directory` and keep other processes from writing a run into it; leave no empty one behind.

    The lock is the kernel's and ends with the process. Raises UserError when another one holds it.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another training is writing to {directory}: choose another --out") from error
    finally:
        os.close(descriptor)
        if created:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary sibling and a rename, so that a failure leaves the old one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_directory(out: Path) -> Iterator[Path]:
    """A temporary sibling, which is flushed to the disk and takes the place of `out` when the body has ended.

    After an error it is removed and `out` is what it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (out.with_name(f".{out.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        staging.mkdir()
        yield staging
        for path in (*staging.rglob("*"), staging):
            flush(path)
        if out.exists():
            os.replace(out, old)
        os.replace(staging, out)
        flush(out.parent)
    finally:
        if old.exists() and not out.exists():  # interrupted between the two
            os.replace(old, out)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables to keep their columns."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def print_titled(title: str, table: Table, console: Console | None = None) -> None:
    """Print the table under a title of one line, which rich would break to the table's width."""
    console = console or wide_console()
    console.print(title, style="italic", markup=False, highlight=False, soft_wrap=True)
    console.print(table)

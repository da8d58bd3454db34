"""Where a run goes on: which checkpoint, whether it belongs to the same run, and the command that says so."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

from gpt import checkpoint
from gpt.cli import UserError


class Resumable(Protocol):
    """Options of a program whose runs can go on."""

    @property
    def out(self) -> Path: ...

    @property
    def resume(self) -> str: ...


def choose_checkpoint(config: Resumable) -> Path | None:
    """Where --resume says to start from, verified; None for a fresh run, which may not bury an older one."""
    checkpoints = config.out / "checkpoints"
    if config.resume == "auto":
        return checkpoint.newest(checkpoints)
    if config.resume != "none":
        path = Path(config.resume)
        found = checkpoint.find(path)
        if found is None:
            raise UserError(
                f"--resume takes auto, none or the directory of a checkpoint or of a run, which {path} is not"
            )
        checkpoint.verify(found)
        return found
    if any(checkpoints.glob("step-*")):
        raise UserError(
            f"{config.out} already holds a run: continue it with --resume auto or choose another --out"
        )
    return None


def check_unchanged(before: dict[str, Any], now: dict[str, Any], start: Path) -> None:
    """Raise UserError naming the first setting that would make the resumed run another one."""
    for name, value in now.items():
        if before[name] != value:
            raise UserError(
                f"cannot resume from {start}: {name} was {before[name]} and is {value} now; "
                "restore it or start afresh in another --out"
            )


def program_of(module: str) -> str:
    """How `module` is run by the interpreter that runs this, as it was named."""
    return shlex.join([sys.orig_argv[0], "-m", module])


def resume_command(program: str, arguments: list[str] | None) -> str:
    """What continues a run of `program`, all that comes before its options, with these options."""
    given = [argument for argument in arguments or [] if not argument.startswith("--resume=")]
    if "--resume" in given:
        position = given.index("--resume")
        del given[position : position + 2]
    return f"{program} {shlex.join([*given, '--resume', 'auto'])}"


def launched_by(arguments: list[str] | None) -> str:
    """How torchrun was started, up to these options, which it has handed on to this process.

    That is what the parent process says of itself; "torchrun [as before] -m gpt.train" where it has others.
    """
    options = list(arguments or [])
    command = Path(f"/proc/{os.getppid()}/cmdline")
    started = command.read_text().split("\0")[:-1] if command.is_file() else []
    program, given = started[: len(started) - len(options)], started[len(started) - len(options) :]
    if len(program) < 2 or given != options:
        return "torchrun [as before] -m gpt.train"
    script = Path(program[1]).name == "torchrun"  # whose first line names the Python before it
    return shlex.join(program[1:] if script else program)

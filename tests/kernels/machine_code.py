"""What the compiler made of the kernels: for tests of what no value shows."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import tapelm

# Of x86 and of Armv8, with the address that it goes to.
JUMP = re.compile(r"(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,)\s+([0-9a-f]+)\b")


def extension() -> Path:
    folder = Path(tapelm.__file__).parent
    return next(path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists())


@cache
def _listing(file: Path, objdump: str) -> str:
    command = [objdump, "-d", "-C", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(
    pattern: str, file: Path | None = None, objdump: str = "objdump"
) -> list[tuple[re.Match[str], list[tuple[int, str]]]]:
    """(match of the name, [(address, instruction)]) of the functions in whose names the pattern is found.

    Of the extension, if no other file is given.
    """
    found = []
    listing = _listing(file or extension(), objdump)
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", listing, re.MULTILINE):
        if not name.endswith("@plt") and (match := re.search(pattern, name)):
            lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", body, re.MULTILINE)
            found.append((match, [(int(address, 16), text) for address, text in lines]))
    return found


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions between a backward jump and its target, where no other such loop lies within."""
    places = {address: place for place, (address, _) in enumerate(code)}
    loops = []
    for place, (address, text) in enumerate(code):
        jump = JUMP.match(text)
        if jump and (target := int(jump[1], 16)) in places and target <= address:
            loops.append(range(places[target], place + 1))
    inner = [loop for loop in loops if not any(o != loop and o[0] in loop and o[-1] in loop for o in loops)]
    return [[code[place][1] for place in loop] for loop in inner]

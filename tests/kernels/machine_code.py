"""What the compiler made of the kernels: for tests of what no value shows."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import tapelm


@cache
def _listing() -> str:
    folder = Path(tapelm.__file__).parent
    extension = next(path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists())
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(pattern: str) -> list[tuple[re.Match[str], list[tuple[int, str]]]]:
    """(match of the name, [(address, instruction)]) of the functions in whose names the pattern is found."""
    found = []
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", _listing(), re.MULTILINE):
        if not name.endswith("@plt") and (match := re.search(pattern, name)):
            lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", body, re.MULTILINE)
            found.append((match, [(int(address, 16), text) for address, text in lines]))
    return found

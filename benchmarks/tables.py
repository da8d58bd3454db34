"""Markdown tables from committed results: python -m benchmarks.tables puts them into README.md and into
benchmarks/README.md, the page of results.

A line `<!-- table KIND FILE -->` there, FILE being in benchmarks/results and written by
`python -m benchmarks` or `python -m gpt.evaluate`, is followed by the table of that kind and by
`<!-- end -->`. What stands between is replaced; a test fails when it is not what the file says.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.compare import RESULTS, Results, read
from benchmarks.table_kinds import KINDS
from gpt.cli import UserError, run_program, write_atomically

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(r"(<!-- table (\S+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def opened(path: Path) -> Results:
    """A file of benchmarks or of gpt.evaluate, which has domains instead of rows."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Results(path, content["machine"], [], content) if "domains" in content else read(path)


def stamp(results: Results) -> str:
    """Machine, date, versions and commit, and the command where the file knows it."""
    machine = results.machine
    cpu = f" ({machine['cpu_model']})" if "cpu_model" in machine else ""
    command = f": `{machine['command']}`" if machine.get("command") else ""
    return (
        f"{machine['device']}{cpu}, {machine['cpu_capability']}, {machine['date']}, commit "
        f"{machine['commit']}, torch {machine['versions']['torch']}{command}"
    )


def table(kind: str, results: Results) -> str:
    if kind not in KINDS:
        raise UserError(f"there is no table of kind {kind!r}; there are: {', '.join(KINDS)}")
    return f"{KINDS[kind](results)}\n<sub>{stamp(results)}</sub>\n"


def splice(text: str, folder: Path = RESULTS) -> str:
    """`text` with every table made anew from its file."""

    def made(block: re.Match[str]) -> str:
        opening, kind, file, _, closing = block.groups()
        return f"{opening}{table(kind, opened(folder / file))}{closing}"

    return BLOCK.sub(made, text)


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError("python -m benchmarks.tables takes no options")
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = splice(old)
        if new != old:
            write_atomically(page, new)
        state = "as they were" if new == old else "changed"
        print(f"{page.relative_to(ROOT)}: {len(BLOCK.findall(new))} tables, {state}")
    return 0


if __name__ == "__main__":
    run_program(main)

"""Launch configurations: those that ship, unless a table measured on the GPU at hand has others.

A table is a JSON file that ``python -m benchmarks tune`` writes:

    {"architecture": "sm_90", "configs": {"norm_forward": {"2 1024": {"BLOCK_R": 2, "num_warps": 2}}}}

``tuned/ARCHITECTURE.json`` beside this file is read when a kernel is first launched on that architecture, any
other after ``use_table``. Nothing is measured while kernels run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._library import architecture

Config = dict[str, int]
FOLDER = Path(__file__).parent / "tuned"


class Choice(NamedTuple):
    """A kernel and what its best configuration depends on, such as "2 1024", bytes per element and width."""

    kernel: str
    key: str


_tables: dict[str, dict[Choice, Config]] = {}
_trial: dict[Choice, Config] = {}
_asked: dict[Choice, Config] = {}


def choose(kernel: str, device: torch.device, key: tuple[Any, ...], shipped: Config) -> Config:
    """The configuration to launch ``kernel`` with.

    Raises:
        ValueError: the table's entry has other parameters than ``shipped``, as one of another version has.
    """
    name, choice = architecture(device), Choice(kernel, " ".join(map(str, key)))
    if name not in _tables:
        path = FOLDER / f"{name}.json"
        _tables[name] = read_table(path)[1] if path.is_file() else {}
    _asked[choice] = shipped
    found = _trial.get(choice) or _tables[name].get(choice, shipped)
    if found.keys() != shipped.keys():
        raise ValueError(
            f"tuning table of {name}: {kernel} {choice.key!r} has {sorted(found)}, needs {sorted(shipped)}; "
            "run python -m benchmarks tune again."
        )
    return found


def read_table(path: Path) -> tuple[str, dict[Choice, Config]]:
    """Architecture and entries of the table in ``path``.

    Raises:
        ValueError: not such a table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {
            Choice(kernel, key): {str(name): int(value) for name, value in config.items()}
            for kernel, configs in content["configs"].items()
            for key, config in configs.items()
        }
        return str(content["architecture"]), entries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of python -m benchmarks tune: {error!r}") from error


def use_table(path: str | Path) -> None:
    """From now on kernels on the architecture that ``path`` was measured on take their configuration from it.

    Raises:
        ValueError: not a table that ``python -m benchmarks tune`` wrote.
    """
    name, entries = read_table(Path(path))
    _tables[name] = entries


@contextmanager
def trial(choice: Choice, config: Config) -> Iterator[None]:
    """Within it, ``choice`` is ``config``, whatever the tables say."""
    _trial[choice] = config
    try:
        yield
    finally:
        del _trial[choice]


@contextmanager
def asked() -> Iterator[dict[Choice, Config]]:
    """Yields a dictionary of the choices made within it and of what ships for each."""
    _asked.clear()
    yield _asked

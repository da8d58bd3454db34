"""Directories of shards: what may be replaced, by what, and how without losing either."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from pathlib import Path

from tapelm._shard_writer import FORMAT, MANIFEST

JOURNAL = "journal.jsonl"  # of files that are being encoded


def strange_files(directory: Path) -> list[str]:
    """Names of what is in `directory` and is no part of shards, nor of shards that are being written."""
    ours = re.compile(rf"shard-\d{{5,}}\.bin|{re.escape(MANIFEST)}|{re.escape(JOURNAL)}")
    return sorted(
        path.name for path in directory.iterdir() if not ours.fullmatch(path.name) or not path.is_file()
    )


def replaceable(out_dir: str | os.PathLike[str]) -> Path:
    """`out_dir`, resolved; raises ValueError when it holds something else than shards."""
    target = Path(out_dir).resolve()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir() or not _has_manifest(target):
        raise ValueError(f"choose another out_dir: {out_dir} exists and is no shard directory")
    if (target.parent / "data_card.json").is_file():
        raise ValueError(f"{out_dir} is part of the data that data.prepare made: choose another out_dir")
    if strange := strange_files(target):
        raise ValueError(
            f"{out_dir} holds {strange[0]}, which is no shard and would be lost: move it elsewhere"
        )
    return target


def _has_manifest(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def sibling(target: Path, kind: str) -> Path:
    """A path beside `target` that no other process or thread uses: NAME.KIND-1f2e3d4c."""
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(4)}")


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what was there is removed afterwards, or put back when renaming fails.

    Warns when the old directory cannot be removed, and says where it is when that is interrupted: the new one
    is in its place all the same.
    """
    old = sibling(target, "old")
    try:
        if target.exists():
            target.rename(old)
        source.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    try:
        if old.exists():
            shutil.rmtree(old)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{target} holds the new data, {old} the rest of the old") from error
    except OSError as error:
        warnings.warn(f"{old}, the data before, cannot be removed: {error}", stacklevel=2)

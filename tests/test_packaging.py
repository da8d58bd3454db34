"""What a source distribution and an installed package hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import build_backend
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
        "build_backend.py",
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


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        ("2.14.1+cu130", "2.14.1"),  # a release as the registry has it, whichever build is here
        ("2.13.0", "2.13.0"),
        ("2.12.1", None),  # installing will replace it by the newest
        ("9.0.0.dev20261130+cpu", None),
        (None, None),
    ],
)
def test_pip_builds_with_the_torch_that_is_installed(
    installed: str | None, taken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        metadata = tmp_path / f"torch-{installed}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Name: torch\nVersion: {installed}\n")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.chdir(ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [each for each in project["dependencies"] if each.startswith("torch")]
    needed = Requirement(wanted if taken is None else f"torch=={taken}")
    for kind in ("wheel", "editable", "sdist"):
        (requirement,) = getattr(build_backend, f"get_requires_for_build_{kind}")()
        assert Requirement(requirement) == needed


def test_an_extension_built_for_another_torch_is_one_sentence() -> None:
    built = torch.__version__.partition("+")[0]
    for version, told in (("2.99.0+cpu", True), (built + "0", True), (built + "a0+git123", False)):
        script = f"import torch; torch.__version__ = {version!r}; import tapelm"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode == 1) is told, done.stderr
        if told:
            assert done.stderr.splitlines()[-1] == (
                f"ImportError: tapelm was built for torch {built}, but torch {version} is installed: run "
                f"`pip install -e .` in the repository to build it for that, or `pip install torch=={built}`."
            )


def test_public_names() -> None:
    assert [name for name in tapelm.__all__ if not hasattr(tapelm, name)] == []
    public = {name for name in vars(tapelm) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "kernels/tapelm").glob("*.py")} | {"proofs"}
    assert public - modules <= set(tapelm.__all__)

"""The README's tree and the files of an op stay what they are said to be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = (
    "attention", "layer_norm", "rms_norm", "add_norm", "dropout", "bias_gelu", "swiglu", "rope", "embedding",
    "linear", "linear_cross_entropy", "adamw", "nf4", "lora_linear",
)  # fmt: skip
PARTS = ("kernels", "launches", "configs", "states")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op: str) -> None:
    expected = [
        f"kernels/tapelm/{op}.py",
        f"csrc/{op}.cpp",
        f"csrc/{op}.inl",
        f"tests/kernels/test_{op}.py",
        f"benchmarks/ops/{op}.py",
    ]
    assert [path for path in expected if not (ROOT / path).is_file()] == []


def test_contributing_says_where_triton_kernels_are() -> None:
    """In the file that its table names, else in the op's own."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| (?:`(_\w+\.py)`|none.*?) \|", text, re.MULTILINE)
    named = {op: file for ops, file in rows for op in ops.split(", ")}
    library = ROOT / "kernels/tapelm"
    for op in OPS:
        holds = [
            f for f in dict.fromkeys((f"{op}.py", named.get(op))) if f and "@triton.jit" in read(library / f)
        ]
        assert holds == [named.get(op, f"{op}.py")] or (op, holds) == ("linear", []), op
    parts = {path.name for kind in PARTS for path in library.glob(f"_*_{kind}.py")}
    mentioned = set(re.findall(r"`(\w+\.(?:py|inl|h))`", text))
    assert parts - mentioned == set()
    csrc = ROOT / "csrc"
    shown = mentioned - {"X.py", "X.inl"}
    assert [
        name
        for name in shown
        if not any((folder / name).is_file() for folder in (library, csrc, ROOT / "benchmarks"))
    ] == []


def test_lines_of_cpp_are_short() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.name != "unicode_tables.h"]  # generated
    lines = ((path, n, line) for path in sources for n, line in enumerate(path.read_text().splitlines(), 1))
    assert [f"{path.relative_to(ROOT)}:{n}" for path, n, line in lines if len(line) > 120] == []


def test_no_op_is_missing_from_this_list() -> None:
    simd = {"simd_vector", "simd_units", "simd_loop", "simd_dots", "simd_norm"}
    products = {"matrix_pack", "matrix_product"}
    parts = {"attention_mask", "attention_pack", "attention_backward", "attention_decode"}
    kernels = {path.stem for path in (ROOT / "csrc").glob("*.inl")} - simd - products - parts
    assert kernels == set(OPS)


def test_readme_tree_matches_the_disk() -> None:
    """Every path in the README's tree exists, and every tracked top-level entry is in it."""
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree is not None
    named = [line.split()[0] for line in tree.group(1).splitlines() if line and not line.startswith("    ")]
    assert [name for name in named if not (ROOT / name).exists()] == []
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    top = {name.split("/")[0] for name in tracked}
    assert top - {name.split("/")[0] for name in named} - {".gitignore"} == set()


def test_no_package_shadows_another() -> None:
    """`kernels` is also a Hugging Face library, and __init__.py under tests would shadow packages."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_setup_py_stays_small() -> None:
    assert len((ROOT / "setup.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "built"),
    [("13.0", "13.2", True), ("13.0", "12.9", False), ("13.0", None, False), (None, "13.2", False)],
)
def test_the_cuda_module_is_built_by_an_nvcc_of_torchs_version_only(
    torch_cuda: str | None, nvcc: str | None, built: bool, tmp_path: Path
) -> None:
    """CUDA_HOME alone says little: images for running programs have one without a compiler."""
    (tmp_path / "bin").mkdir()
    if nvcc is not None:
        program = tmp_path / "bin" / "nvcc"
        program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
        program.chmod(0o755)
    script = f"""
import setuptools, torch, torch.utils.cpp_extension
torch.version.cuda, torch.utils.cpp_extension.CUDA_HOME = {torch_cuda!r}, {str(tmp_path)!r}
setuptools.setup = lambda **options: print([vars(module) for module in options["ext_modules"]])
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("tapelm._cuda" in done.stdout) is built
    assert ("-arch=all-major" in done.stdout) is built, "else PyTorch needs a GPU to choose by"

"""The machine code of the matrix product: its inner loop keeps everything in registers.

A compiler that runs out of them puts operands on the stack, within the loop: values stay right, and a product
of float32 took 1.4 times as long (GCC 12, Zen 5). No timing says so as surely as the code does.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from tests.kernels.machine_code import inner_loops, machine_code

FUSED = re.compile(r"vfmadd|vdpbf16ps")
ARM = "aarch64-linux-gnu-"
ROOT = Path(__file__).parents[2]
SOURCES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/text/*.cpp")))
ON_STACK = re.compile(r"\((%rbp|%rsp)[,)].*%[xyz]mm|%[xyz]mm.*\((%rbp|%rsp)[,)]")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the code of x86")
def test_the_inner_loop_of_a_product_stays_in_registers() -> None:
    checked = []
    for name, code in machine_code(r"tapelm::(avx\w+)::multiply_(rows|columns)<(.*?)>\("):
        products = [loop for loop in inner_loops(code) if sum(bool(FUSED.match(text)) for text in loop) >= 8]
        assert products, f"no loop of products in {name.string}"
        for loop in products:
            assert not [text for text in loop if ON_STACK.search(text)], (name[1], name[3])
        checked.append(name[1])
    assert set(checked) == {"avx2", "avx512", "avx512bf16"} and len(checked) == 18


def compile_for_arm(source: Path, *options: str) -> None:
    """With the headers of this Python and this PyTorch, which say nothing of the CPU that matters here."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    command = [f"{ARM}g++", "-std=c++20", "-Wno-psabi", *(f"-I{folder}" for folder in folders), *options]
    subprocess.run([*command, str(ROOT / source)], check=True)


needs_a_cross_compiler = pytest.mark.skipif(
    shutil.which(f"{ARM}g++") is None, reason="no compiler for Arm; apt-get install g++-aarch64-linux-gnu"
)


@needs_a_cross_compiler
@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_source_compiles_for_arm(source: Path) -> None:
    compile_for_arm(source, "-fsyntax-only")


@needs_a_cross_compiler
@pytest.mark.slow
def test_the_inner_loop_on_arm_stays_in_registers(tmp_path: Path) -> None:
    made = tmp_path / "product.o"
    compile_for_arm(Path("csrc/matrix_product.cpp"), "-O3", "-ffp-contract=fast", "-c", "-o", str(made))
    functions = machine_code(r"tapelm::generic::multiply_(rows|columns)<", made, f"{ARM}objdump")
    assert len(functions) == 6
    for name, code in functions:
        products = [loop for loop in inner_loops(code) if sum(text.startswith("fmla") for text in loop) >= 16]
        assert products, f"no loop of products in {name.string}"
        for loop in products:
            assert not [text for text in loop if re.search(r"\bq\d+.*\[(sp|x29)", text)], name.string

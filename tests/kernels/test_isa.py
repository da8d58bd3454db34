"""Every variant of the CPU kernels computes the same: a machine's own is not the only one that others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SAME_TESTS = "cpu and (values or gradients) and not interpreter"
VARIANTS = ("generic", "avx2", "avx512", "avx512bf16")


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TAPELM_ISA": isa, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


ONE_PRODUCT = "import tapelm, torch; tapelm.attention(*[torch.ones(1, 1, 4, 8)] * 3)"


@pytest.mark.parametrize("isa", VARIANTS)
def test_values_and_gradients_of_every_instruction_set(isa: str) -> None:
    trial = run(isa, "-c", ONE_PRODUCT)
    if "is not supported by this CPU" in trial.stderr:
        pytest.skip(f"this CPU has no {isa}")
    tests = run(
        isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow and not gpu",
        "-k", SAME_TESTS, f"--ignore={__file__}", str(Path(__file__).parent),
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout[-4000:]


def test_an_unknown_instruction_set_is_an_error() -> None:
    told = run("sse", "-c", ONE_PRODUCT).stderr
    assert "TAPELM_ISA must be generic, avx2, avx512 or avx512bf16, not 'sse'" in told


def test_an_unknown_instruction_set_is_an_error_of_the_text_extension() -> None:
    done = run("sse", "-c", "from tapelm import _text")
    assert "ImportError: TAPELM_ISA must be generic, avx2, avx512 or avx512bf16, not 'sse'" in done.stderr

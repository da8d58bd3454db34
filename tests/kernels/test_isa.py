"""Every variant of the CPU kernels computes the same: a machine's own is not the only one that others run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("values", "gradients")
SAME_TESTS = f"cpu and ({' or '.join(NAMES)}) and not interpreter"
VARIANTS = ("generic", "avx2", "avx512", "avx512bf16")


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        # Plugins that these tests do without take a second to import.
        env=os.environ | {"TAPELM_ISA": isa, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        timeout=300,
    )


def files() -> list[str]:
    """Those that define such a test: importing all others, and transformers with them, takes seconds."""
    others = set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}
    named = re.compile(rf"def test_\w*({'|'.join(NAMES)})")
    return [str(path) for path in sorted(others) if named.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("isa", VARIANTS)
def test_values_and_gradients_of_every_instruction_set(isa: str) -> None:
    tests = run(
        isa, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "-m", "not slow and not gpu",
        "-k", SAME_TESTS, *files(),
    )  # fmt: skip
    if "is not supported by this CPU" in tests.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert tests.returncode == 0, tests.stdout[-4000:]


ONE_PRODUCT = "import tapelm, torch; tapelm.attention(*[torch.ones(1, 1, 4, 8)] * 3)"


def test_an_unknown_instruction_set_is_an_error() -> None:
    told = run("sse", "-c", ONE_PRODUCT).stderr
    assert "TAPELM_ISA must be generic, avx2, avx512 or avx512bf16, not 'sse'" in told


def test_an_unknown_instruction_set_is_an_error_of_the_text_extension() -> None:
    done = run("sse", "-c", "from tapelm import _text")
    assert "ImportError: TAPELM_ISA must be generic, avx2, avx512 or avx512bf16, not 'sse'" in done.stderr

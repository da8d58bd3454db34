"""The Triton kernels compile for real GPUs as they ship and keep everything in registers; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

SCRIPT = Path(__file__).with_name("compile_triton.py")
# The configurations a GPT trains with; `python compile_triton.py 80,90` goes over all of them.
QUICK = [
    "attention forward 64", "attention keys 64", "attention queries 64", "attention delta 64",
    "layer_norm forward 768", "layer_norm backward 768", "layer_norm forward wide",
    "add_norm layer dropout forward 768", "add_norm layer dropout backward 768", "swiglu",
    "rope 64", "bias_gelu", "dropout", "cross_entropy", "grad_norm", "adamw",
]  # fmt: skip


def compile_all(capability: int, labels: list[str]) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *labels],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills(capability):
    rows = compile_all(capability, QUICK)
    assert len(rows) > 30
    spilled = [row for row in rows if row["spilled"]]
    assert not spilled, spilled


@pytest.mark.slow
def test_streaming_kernels_load_128_bits():
    for row in compile_all(
        80, ["layer_norm forward 1024", "bias_gelu", "cross_entropy", "adamw", "grad_norm"]
    ):
        assert row["wide_loads"], row

"""The machine code of the matrix product: its inner loop keeps everything in registers.

A compiler that runs out of them puts operands on the stack, within the loop: values stay right, and a product
of float32 took 1.4 times as long (GCC 12, Zen 5). No timing says so as surely as the code does.
"""

from __future__ import annotations

import platform
import re

import pytest

from tests.kernels.machine_code import machine_code

FUSED = re.compile(r"vfmadd|vdpbf16ps")
ON_STACK = re.compile(r"\((%rbp|%rsp)[,)].*%[xyz]mm|%[xyz]mm.*\((%rbp|%rsp)[,)]")


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """The instructions between a backward jump and its target, where no other such loop lies within."""
    places = {address: place for place, (address, _) in enumerate(code)}
    loops = []
    for place, (address, text) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        if jump and (target := int(jump[1], 16)) in places and target <= address:
            loops.append(range(places[target], place + 1))
    inner = [loop for loop in loops if not any(o != loop and o[0] in loop and o[-1] in loop for o in loops)]
    return [[code[place][1] for place in loop] for loop in inner]


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

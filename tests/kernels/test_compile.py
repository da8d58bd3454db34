"""torch.compile and torch.export take every op as it is: one graph, any number of rows, the same results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import tapelm
from tests.kernels.op_cases import OP_CASES, QUANTIZED, OpCase, made

ROWS = (6, 9, 17)


@pytest.fixture(autouse=True)
def fresh_compiler(one_thread) -> None:
    torch._dynamo.reset()


def results(run: Callable[..., tuple[Tensor, ...]], case: OpCase, rows: int) -> list[Tensor]:
    """Values and gradients."""
    leaves = case.leaves(rows)
    torch.manual_seed(3)  # for the seeds that are drawn in the graph
    outputs = run(*leaves)
    loss = torch.stack([(y * y.detach().cos()).sum() for y in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", OP_CASES)
def test_one_graph_serves_any_number_of_rows(name: str, backend: str) -> None:
    """fullgraph=True raises at a graph break, the stance where a second number of rows is compiled anew."""
    case = OP_CASES[name]
    compiled = torch.compile(case.outputs, fullgraph=True, backend=backend, dynamic=True)
    with inductor_config.patch(fallback_random=True):
        found = [results(compiled, case, ROWS[0])]
        with torch.compiler.set_stance("fail_on_recompile"):
            found += [results(compiled, case, rows) for rows in ROWS[1:]]
    for rows, each in zip(ROWS, found, strict=True):
        for ours, expected in zip(each, results(case.outputs, case, rows), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nf4_is_made_and_read_in_one_graph(backend: str) -> None:
    """The scales of the scales are plain PyTorch, which inductor rounds otherwise."""

    def there_and_back(weight: Tensor) -> Tensor:
        return tapelm.nf4_dequantize(tapelm.nf4_quantize(weight)) + tapelm.nf4_dequantize(QUANTIZED)

    weight = made(24, 64)
    compiled = torch.compile(there_and_back, fullgraph=True, backend=backend)
    slack = 0.0 if backend == "aot_eager" else 1e-6
    torch.testing.assert_close(compiled(weight), there_and_back(weight), rtol=slack, atol=slack)


class Block(nn.Module):
    """A layer of a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(made(32))
        self.qkv, self.up, self.down = (
            nn.Parameter(made(*shape)) for shape in ((64, 32), (64, 32), (32, 32))
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, targets: Tensor) -> Tensor:
        h = tapelm.rms_norm(x, self.norm)
        qkv = tapelm.linear(h, self.qkv).unflatten(-1, (4, 16)).transpose(1, 2)
        q, k = tapelm.rope(qkv[:, :2], qkv[:, 2:3], cos, sin)
        attended = tapelm.attention(q, k, qkv[:, 3:]).transpose(1, 2).flatten(2)
        h, x = tapelm.add_rms_norm(attended, x, self.norm)
        x = x + tapelm.linear(tapelm.swiglu(*tapelm.linear(h, self.up).chunk(2, -1)), self.down)
        return tapelm.linear_cross_entropy(x.flatten(0, 1), self.up, targets.flatten())


def test_a_block_is_exported_for_any_length() -> None:
    def inputs(rows: int) -> tuple[Tensor, ...]:
        tables = made(rows, 16)
        targets = torch.arange(2 * rows).reshape(2, rows) % 64
        return made(2, rows, 32), tables.cos(), tables.sin(), targets

    block, rows = Block(), torch.export.Dim("rows", min=2, max=512)
    sizes = {"x": {1: rows}, "cos": {0: rows}, "sin": {0: rows}, "targets": {1: rows}}
    program = torch.export.export(block, inputs(6), dynamic_shapes=sizes)
    called = {str(node.target) for node in program.graph.nodes if "tapelm" in str(node.target)}
    assert {name.split(".")[1] for name in called} == {
        "rms_norm_forward", "linear_forward", "rope", "attention_forward", "add_norm_forward",
        "swiglu_forward", "linear_cross_entropy_forward",
    }  # fmt: skip
    for length in (6, 33):
        torch.testing.assert_close(program.module()(*inputs(length)), block(*inputs(length)))

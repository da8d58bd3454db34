"""The optimized model as one graph for torch.compile, on CPU and on fake CUDA tensors; its flops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.ops import load_ops

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=97, dropout=0.1)
BATCH = 4


def build() -> GPT:
    return GPT(SHAPE, load_ops("optimized")).initialize(7)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPE.vocab_size, (BATCH, SHAPE.block_size + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def losses_and_gradients(model: GPT, forward: object) -> list[torch.Tensor]:
    torch.manual_seed(5)
    loss = forward(*batch())  # type: ignore[operator]
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(backend: str) -> None:
    """fullgraph=True raises at a graph break. With dropout on: the seeds are drawn inside the graph."""
    torch._dynamo.reset()
    model = build()
    expected = losses_and_gradients(model, model)
    with torch._inductor.config.patch(fallback_random=True):
        found = losses_and_gradients(model, torch.compile(model, fullgraph=True, backend=backend))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# PyTorch built for CPUs has no device guard for CUDA, which indexing and autograd ask for even of fake
# tensors.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""
ON_FAKE_CUDA = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.ops import load_ops

if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
with torch.device("meta"):
    model = GPT(ModelConfig(2, 2, 32, 24, 97, 0.1), load_ops("optimized"))
graphs = []

def keep(graph, _):
    graphs.append(graph)
    return graph.forward

with FakeTensorMode():
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
            setattr(module, name, torch.nn.Parameter(fake))
    ids, targets = (torch.empty(4, 24, dtype=torch.int64, device="cuda") for _ in range(2))
    loss = torch.compile(model, fullgraph=True, backend=keep)(ids, targets)
assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == () and loss.requires_grad
print(len(graphs))
parts = [part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
targets = {str(node.target) for part in parts for node in part.graph.nodes}
print(*sorted(target for target in targets if "tapelm" in target))
"""


def test_trains_as_one_graph_on_fake_cuda(tmp_path: Path) -> None:
    """Fake CUDA tensors take the path of the GPU up to the kernels; a process of its own for the guard."""
    arguments = []
    if not torch.cuda.is_available():
        source, library = tmp_path / "guard.cpp", tmp_path / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        root = Path(torch.__file__).parent
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root}/include",
            str(source),
            "-o",
            str(library),
        ]
        subprocess.run([*command, f"-L{root}/lib", "-lc10"], check=True)
        arguments.append(str(library))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", ON_FAKE_CUDA, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    count, ops = done.stdout.strip().splitlines()
    assert count == "1"
    for op in (
        "attention_forward",
        "layer_norm_forward",
        "add_norm_forward",
        "bias_gelu_forward",
        "embedding_forward",
    ):
        assert f"tapelm.{op}" in ops


def test_flop_counter_counts_the_model() -> None:
    """What PyTorch's counter finds is `flops_per_token`, but for two known differences in attention.

    Flash attention's backward multiplies five times, as it makes the scores again, where 3x forward is four;
    and of T queries and keys T (T + 1) / 2 pairs are visible, of which `flops_per_token` counts T * T / 2.
    """
    model = build()
    with FlopCounterMode(display=False) as counter:
        model(*batch()).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    forward = next(flops for name, flops in counts.items() if "attention_forward" in name)
    backward = next(flops for name, flops in counts.items() if "attention_backward" in name)
    T, tokens = SHAPE.block_size, BATCH * SHAPE.block_size
    assert backward * 4 == forward * 10
    as_counted = counter.get_total_flops() - backward / 5 - 3 * forward / (T + 1)
    assert as_counted == pytest.approx(SHAPE.flops_per_token() * tokens, rel=1e-12)

"""The optimized model as one graph for torch.compile, on CPU and on fake CUDA tensors; its flops are counted."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
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


def fake_cuda(model: GPT, dtype: torch.dtype) -> GPT:
    """The model with fake CUDA parameters; to be called under FakeTensorMode, on a model on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=dtype, device="cuda")
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiles_as_one_graph_for_cuda(dtype: torch.dtype) -> None:
    """Fake CUDA tensors take the path of the GPU up to the kernels. Without gradients: PyTorch built for CPUs
    has no autograd of CUDA tensors."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = GPT(SHAPE, load_ops("optimized"))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), torch.no_grad():
        fake_cuda(model, dtype)
        ids, targets = (
            torch.empty(BATCH, SHAPE.block_size, dtype=torch.int64, device="cuda") for _ in range(2)
        )
        loss = torch.compile(model, fullgraph=True, backend=keep)(ids, targets)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.shape == ()
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes}
    for op in ("attention_forward", "layer_norm_forward", "bias_gelu_forward", "linear_cross_entropy_forward"):
        assert any(f"tapelm.{op}" in name for name in called), op


def test_flop_counter_counts_the_model() -> None:
    """What PyTorch's counter finds is `flops_per_token`, but for two known differences in attention.

    Flash attention's backward multiplies five times, as it makes the scores again, where 3x forward is four; and
    of T queries and keys T (T + 1) / 2 pairs are visible, of which `flops_per_token` counts T * T / 2.
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

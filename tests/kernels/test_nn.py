"""Modules that stand for PyTorch's: state dicts, values and gradients equal theirs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import tapelm
from tapelm.testing import assert_close

PAIRS = {
    "linear": (lambda kind: kind.Linear(24, 40), 24),
    "linear without bias": (lambda kind: kind.Linear(24, 40, bias=False), 24),
    "layer_norm": (lambda kind: kind.LayerNorm(24, eps=1e-3), 24),
    "rms_norm": (lambda kind: kind.RMSNorm(24, eps=1e-3), 24),
    "rms_norm without eps": (lambda kind: kind.RMSNorm((24,)), 24),
}


def moved(module: nn.Module) -> nn.Module:
    """With ones and zeros of norms replaced, which would hide faults."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def gradients(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_of_a_loaded_state_dict(name, dtype):
    make, width = PAIRS[name]
    theirs = moved(make(nn)).to(dtype)
    ours = make(tapelm.nn).to(dtype)
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    make(nn).load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(3, 5, width, dtype=dtype)
    grad = torch.randn_like(theirs(x))
    found = [
        gradients(module, x.to(d), grad)
        for module, d in ((ours, dtype), (theirs, dtype), (exact, torch.float64))
    ]
    for place, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert a.dtype == dtype
        assert_close(f"{name} {place}", dtype, a, b, c)


def test_swiglu_is_the_mlp_of_llama(dtype):
    mlp = moved(tapelm.nn.SwiGLU(16, 40, bias=True)).to(dtype)
    assert [*mlp.state_dict()] == [
        f"{layer}_proj.{kind}" for layer in ("gate", "up", "down") for kind in ("weight", "bias")
    ]
    x = torch.randn(3, 16, dtype=dtype)

    def reference(x: torch.Tensor) -> torch.Tensor:
        w = {name: tensor.to(x.dtype) for name, tensor in mlp.state_dict().items()}
        gate, up = (F.linear(x, w[f"{k}_proj.weight"], w[f"{k}_proj.bias"]) for k in ("gate", "up"))
        return F.linear(F.silu(gate) * up, w["down_proj.weight"], w["down_proj.bias"])

    assert_close("swiglu", dtype, mlp(x).detach(), reference(x), reference(x.double()))


def test_a_head_gives_logits_or_their_loss():
    head, x = tapelm.nn.LMHead(16, 50), torch.randn(2, 7, 16)
    targets = torch.randint(50, (2, 7))
    targets[0, :3] = -1
    expected = F.cross_entropy(head(x).flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(head(x, targets, -1), expected)


def test_dropout_in_training_alone():
    layer, x = tapelm.nn.Dropout(0.25), torch.ones(64, 256)
    assert torch.equal(layer.eval()(x), x)
    y = layer.train()(x)
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(y.max()) == pytest.approx(4 / 3)


def test_a_frozen_weight_gets_no_gradient_and_costs_none():
    layer, x = tapelm.nn.Linear(64, 64), torch.randn(64, 64, requires_grad=True)
    layer.weight.requires_grad_(False)
    with torch.profiler.profile() as profiler:
        layer(x).sum().backward()
    assert not [event.key for event in profiler.key_averages() if "tapelm::linear" in event.key]
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(64, 64))


def test_optimize_exchanges_what_it_can_in_place():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(
        shared, nn.LayerNorm(16), nn.RMSNorm(16), nn.Dropout(0.1), nn.Sequential(shared, nn.GELU()),
        nn.LayerNorm(16, bias=False), nn.LayerNorm((2, 16)), nn.RMSNorm(16, elementwise_affine=False),
        nn.Dropout(1.0), nn.TransformerEncoderLayer(16, 2, batch_first=True),
    )  # fmt: skip
    moved(model).eval()
    parameters, before = dict(model.named_parameters()), model.state_dict()
    x = torch.randn(3, 2, 16)
    expected = model(x[:1]), model[:5](x)
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    assert tapelm.nn.optimize(model) is model
    assert [type(module) for module in model[:4]] == [
        getattr(tapelm.nn, n) for n in ("Linear", "LayerNorm", "RMSNorm", "Dropout")
    ]
    assert model[4][0] is model[0]
    assert [type(module) for module in model[5:9]] == [nn.LayerNorm, nn.LayerNorm, nn.RMSNorm, nn.Dropout]
    assert type(model[9].linear1) is tapelm.nn.Linear
    assert not any(module.training for module in model.modules())
    assert [*model.state_dict()] == [*before]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(x[:1]), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[:5](x), expected[1], rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_optimized_twice_is_optimized():
    model = tapelm.nn.optimize(nn.Sequential(nn.Linear(8, 8)))
    layer = model[0]
    assert tapelm.nn.optimize(model)[0] is layer


def test_a_replaced_forward_is_an_error_and_nothing_has_changed():
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8)))
    model[1][0].forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of 1\.0 \(Linear\) has been replaced"):
        tapelm.nn.optimize(model)
    assert type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tapelm.nn.LayerNorm((2, 3)), "use torch.nn.LayerNorm"),
        (lambda: tapelm.nn.LayerNorm(3, bias=False), "use torch.nn.LayerNorm"),
        (lambda: tapelm.nn.RMSNorm(3, elementwise_affine=False), "use torch.nn.RMSNorm"),
    ],
)
def test_what_the_kernels_do_not_compute(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compiles():
    model = tapelm.nn.optimize(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.Dropout(0.1))
    )
    x = torch.randn(4, 8)
    expected = model.eval()(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_module_with_more_of_its_own_stays():
    masked, tagged = nn.Linear(4, 4), nn.Linear(4, 4)
    masked.register_buffer("mask", torch.ones(4))
    tagged.tag = "kept"  # type: ignore[assignment]
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    model = nn.Sequential(masked, tagged, pruned, nn.utils.weight_norm(nn.Linear(4, 4)))
    before = set(model.state_dict())
    tapelm.nn.optimize(model)
    assert set(model.state_dict()) == before
    assert [type(module) is tapelm.nn.Linear for module in model] == [False, True, False, False]
    assert model[1].tag == "kept"
    assert model(torch.randn(3, 4)).shape == (3, 4)


def test_rms_norm_without_eps_has_pytorchs():
    x = (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1e-2).bfloat16()
    expected = nn.RMSNorm(8, dtype=torch.bfloat16)(x)
    torch.testing.assert_close(tapelm.nn.RMSNorm(8, dtype=torch.bfloat16)(x), expected, rtol=1e-2, atol=0.0)

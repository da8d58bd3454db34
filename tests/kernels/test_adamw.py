import copy
import importlib

import pytest
import torch

import tapelm
from tapelm.adamw import adamw_reference
from tapelm.testing import check_registration

# Ragged, a scalar, empty, and with small_chunks one that spans three chunks on CUDA and in the interpreter.
SHAPES = [(7, 5), (3,), (), (0, 4), (2100,)]
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("tapelm.adamw"), "CHUNK", 1024)


def parameters(dtype, device, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def set_gradients(params, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape) * scale).to(p.device, p.dtype)


def train(optimizer, params, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        set_gradients(params)
        optimizer.step()


def test_equals_torch_over_20_steps(device):
    ours = parameters(torch.float32, device)
    theirs = copy.deepcopy(ours)
    optimizer, peer = tapelm.AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for _ in range(20):
        set_gradients(ours)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        optimizer.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_equals_float64_reference(device):
    p = parameters(torch.float32, device, [(40,)])[0]
    state = (
        p.detach().double(),
        torch.zeros(40, device=device).double(),
        torch.zeros(40, device=device).double(),
    )
    optimizer = tapelm.AdamW([p], **SETTINGS)
    for step in range(1, 6):
        set_gradients([p])
        state = adamw_reference(*state[:1], p.grad.double(), *state[1:], step=step, **SETTINGS)
        optimizer.step()
    torch.testing.assert_close(p.double(), state[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), state[2], rtol=1e-6, atol=0)


def test_bfloat16_follows_its_float32_master(device):
    half = parameters(torch.bfloat16, device)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    ours, peer = tapelm.AdamW(half, **SETTINGS), torch.optim.AdamW(full, **SETTINGS)
    for _ in range(10):
        set_gradients(half)
        for a, b in zip(half, full, strict=True):
            b.grad = a.grad.float()
        ours.step()
        peer.step()
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(ours.state[a]["master"], b, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, ours.state[a]["master"].bfloat16())


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clipping_equals_torch(scale, device):
    # Two groups and two dtypes, clipped together.
    ours = parameters(torch.float32, device, [(50,), (4, 4)]) + parameters(torch.bfloat16, device, [(33,)])
    theirs = [torch.nn.Parameter(p.detach().float()) for p in ours]
    groups = [{"params": ours[:1], "lr": 1e-2}, {"params": ours[1:], "weight_decay": 0.0}]
    optimizer = tapelm.AdamW(groups, **SETTINGS, max_grad_norm=1.0)
    peer = torch.optim.AdamW(
        [{"params": theirs[:1], "lr": 1e-2}, {"params": theirs[1:], "weight_decay": 0.0}], **SETTINGS
    )
    for _ in range(3):
        set_gradients(ours, scale)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        peer.step()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(optimizer.state[a].get("master", a), b, rtol=1e-6, atol=1e-6)


def test_repeats_bit_for_bit(dtype, device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        params = parameters(dtype, device)
        train(tapelm.AdamW(params, **SETTINGS, max_grad_norm=0.5), params, 2, seed=1)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_dict_round_trip_is_exact(dtype, device):
    params = parameters(dtype, device)
    optimizer = tapelm.AdamW(params, **SETTINGS, max_grad_norm=1.0)
    train(optimizer, params, 2, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = copy.deepcopy(params)
    resumed = tapelm.AdamW(copies, lr=9.0, max_grad_norm=1.0)
    resumed.load_state_dict(saved)
    for p in copies:
        assert all(
            value.dtype == torch.float32 for value in resumed.state[p].values() if torch.is_tensor(value)
        )
    train(optimizer, params, 2, seed=2)
    train(resumed, copies, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
    # Loading copied: the saved state did not move with the resumed run.
    assert all(state["step"] == 2 for state in saved["state"].values())
    assert not torch.equal(saved["state"][0]["exp_avg"], resumed.state[copies[0]]["exp_avg"])


def test_loads_the_state_of_torch_adamw():
    theirs = parameters(torch.float32, "cpu")
    peer = torch.optim.AdamW(theirs, **SETTINGS)
    train(peer, theirs, 3, seed=1)
    ours = copy.deepcopy(theirs)
    optimizer = tapelm.AdamW(ours, **SETTINGS)
    optimizer.load_state_dict(peer.state_dict())
    train(peer, theirs, 3, seed=2)
    train(optimizer, ours, 3, seed=2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_parameters_without_gradient_are_left_alone():
    params = parameters(torch.float32, "cpu", [(4,), (4,)])
    before = params[0].detach().clone()
    optimizer = tapelm.AdamW(params, **SETTINGS)
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    # A parameter that joins later has its own step count.
    set_gradients(params)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [1, 2]


def test_no_gradients_and_closure():
    params = parameters(torch.float32, "cpu", [(4,)])
    optimizer = tapelm.AdamW(params, **SETTINGS, max_grad_norm=1.0)
    assert optimizer.step() is None

    def closure():
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert optimizer.state[params[0]]["step"] == 1


def test_in_place_update_is_seen_by_autograd():
    p = parameters(torch.float32, "cpu", [(4,)])[0]
    loss = p.square().sum()
    p.grad = torch.ones(4)
    tapelm.AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_elements(dtype):
    # Several chunks of the C++ kernel.
    params = parameters(dtype, "cpu", [(150_001,)])
    full = [torch.nn.Parameter(p.detach().float()) for p in params]
    set_gradients(params)
    full[0].grad = params[0].grad.float()
    optimizer = tapelm.AdamW(params, **SETTINGS)
    optimizer.step()
    torch.optim.AdamW(full, **SETTINGS).step()
    found = optimizer.state[params[0]].get("master", params[0])
    torch.testing.assert_close(found, full[0], rtol=1e-6, atol=1e-6)
    found = torch.ops.tapelm.grad_norm([params[0].grad])
    torch.testing.assert_close(found.double(), params[0].grad.double().norm(), rtol=1e-5, atol=0)


def test_grad_norm(dtype, device):
    grads = [torch.randn(shape).to(device, dtype) for shape in SHAPES]
    expected = torch.cat([g.double().flatten() for g in grads]).norm()
    found = torch.ops.tapelm.grad_norm(grads)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_registration():
    def some():
        return [torch.rand(4), torch.rand(2, 3)]

    check_registration("grad_norm", some())
    check_registration(
        "adamw_step_", some(), some(), some(), some(), [], torch.ones(()), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_step_is_the_same(dtype, backend):
    """One graph; each new learning rate compiles another, as with torch.optim while it is a float."""
    torch._dynamo.reset()
    ours = parameters(dtype, "cpu")
    theirs = copy.deepcopy(ours)
    compiled, eager = (tapelm.AdamW(params, **SETTINGS, max_grad_norm=0.5) for params in (ours, theirs))
    step = torch.compile(compiled.step, backend=backend, fullgraph=True)
    for lr in (1e-2, 1e-2, 1e-2, 3e-3):
        set_gradients(ours)
        for a, b in zip(ours, theirs, strict=True):
            b.grad = a.grad.clone()
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = lr
        step()
        eager.step()
    assert torch.equal(compiled.grad_norm, eager.grad_norm)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for name, value in compiled.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(eager.state[b][name])), name


@pytest.mark.parametrize(
    "arguments,error,match",
    [
        ({"state_bits": 8}, ValueError, "only 32 exists"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm"),
        ({"lr": -1.0}, ValueError, "lr is"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay"),
    ],
)
def test_bad_hyperparameters(arguments, error, match):
    with pytest.raises(error, match=match):
        tapelm.AdamW(parameters(torch.float32, "cpu", [(3,)]), **arguments)


def test_bad_parameters():
    with pytest.raises(TypeError, match="float64"):
        tapelm.AdamW([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="not contiguous"):
        tapelm.AdamW([torch.nn.Parameter(torch.zeros(3, 4).t())])
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        tapelm.AdamW([p]).step()

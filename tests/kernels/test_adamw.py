import copy
import functools
import importlib

import pytest
import torch

import tapelm
from tapelm._adamw_states import dequantize, quantize
from tapelm._philox import philox_reference
from tapelm.adamw import adamw_reference, random_key
from tapelm.testing import check_registration, interpreted_triton

# Ragged, a scalar, empty, and with small_chunks one that spans three chunks on CUDA and in the interpreter.
SHAPES = [(7, 5), (3,), (), (0, 4), (2100,)]
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("tapelm._adamw_launches"), "CHUNK", 1024)


def parameters(dtype, device, shapes=SHAPES):
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]


def set_gradients(params, scale=1.0):
    for p in params:
        p.grad = (torch.randn(p.shape) * scale).to(p.device, p.dtype)


# The ways to store bfloat16 parameters and moments.
FORMATS = [
    {}, {"state_bits": 8}, {"stochastic_seed": 5}, {"state_bits": 8, "stochastic_seed": 5},
]  # fmt: skip
# From 4096 elements on moments are quantized; 4100 and 41 * 101 end in short blocks.
LARGE_SHAPES = [(7, 5), (), (0, 3), (4100,), (41, 101)]


@pytest.fixture(params=FORMATS, ids=lambda chosen: " ".join(chosen) or "plain")
def stored(request):
    return request.param


def tensors_of(state):
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


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


def step_beside(ours, half, peer, full):
    """One step of both with the gradients of `half`; the masters of ours are the parameters of the peer."""
    set_gradients(half)
    for a, b in zip(half, full, strict=True):
        b.grad = a.grad.float()
    ours.step()
    peer.step()
    for a, b in zip(half, full, strict=True):
        torch.testing.assert_close(ours.state[a]["master"], b, rtol=1e-6, atol=1e-6)
        assert torch.equal(a, ours.state[a]["master"].bfloat16())


def test_bfloat16_follows_its_float32_master(device):
    half = parameters(torch.bfloat16, device)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    ours, peer = tapelm.AdamW(half, **SETTINGS), torch.optim.AdamW(full, **SETTINGS)
    for _ in range(10):
        step_beside(ours, half, peer, full)


def test_a_master_can_begin_unrounded(device):
    full = parameters(torch.float32, device)
    half = [torch.nn.Parameter(torch.zeros_like(p, dtype=torch.bfloat16)) for p in full]
    ours, peer = tapelm.AdamW(half, **SETTINGS), torch.optim.AdamW(full, **SETTINGS)
    for a, b in zip(half, full, strict=True):
        ours.set_master(a, b.detach())
        assert torch.equal(a, b.bfloat16()) and torch.equal(ours.state[a]["master"], b)
    step_beside(ours, half, peer, full)
    with pytest.raises(ValueError, match="half-precision parameter of this optimizer"):
        ours.set_master(full[0], full[0].detach())
    with pytest.raises(ValueError, match="value has shape"):
        ours.set_master(half[0], torch.zeros(3))


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


def test_repeats_bit_for_bit(dtype, device, stored):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        params = parameters(dtype, device, LARGE_SHAPES)
        train(tapelm.AdamW(params, **SETTINGS, max_grad_norm=0.5, **stored), params, 2, seed=1)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_dict_round_trip_is_exact(dtype, device, stored):
    params = parameters(dtype, device, LARGE_SHAPES)
    optimizer = tapelm.AdamW(params, **SETTINGS, max_grad_norm=1.0, **stored)
    train(optimizer, params, 2, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    copies = copy.deepcopy(params)
    # The seed comes with the state.
    fresh = {**stored, "stochastic_seed": 99} if "stochastic_seed" in stored else stored
    resumed = tapelm.AdamW(copies, lr=9.0, max_grad_norm=1.0, **fresh)
    resumed.load_state_dict(saved)
    for a, b in zip(params, copies, strict=True):
        before, after = tensors_of(optimizer.state[a]), tensors_of(resumed.state[b])
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
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


@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=["float32 gradients", "own gradients"])
def test_devices_agree_bit_for_bit(dtype, stored, grad_dtype):
    """The C++ kernel and the Triton kernel, on a GPU or in the interpreter, parameters and states."""

    def trained(device="cpu"):
        torch.manual_seed(3)
        params = parameters(dtype, device, LARGE_SHAPES)
        optimizer = tapelm.AdamW(params, **SETTINGS, **stored)
        for _ in range(3):
            for p in params:
                p.grad_dtype = grad_dtype or dtype
                p.grad = (torch.randn(p.shape) * torch.rand(p.shape) ** 8).to(device, p.grad_dtype)
            optimizer.step()
        tensors = [{"p": p.detach(), **tensors_of(optimizer.state[p])} for p in params]
        return [{name: tensor.cpu() for name, tensor in each.items()} for each in tensors]

    by_cpu = trained()
    if torch.cuda.is_available():
        by_triton = trained("cuda")
    else:
        with interpreted_triton():
            by_triton = trained()
    for a, b in zip(by_cpu, by_triton, strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_float32_gradients_of_bfloat16_parameters(device):
    """Equal to bfloat16 gradients of the same values, clipped together with them."""
    torch.manual_seed(0)
    ours = parameters(torch.bfloat16, device, LARGE_SHAPES)
    theirs = copy.deepcopy(ours)
    optimizers = [tapelm.AdamW(params, **SETTINGS, max_grad_norm=1.0) for params in (ours, theirs)]
    for _ in range(2):
        set_gradients(theirs)
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad_dtype = torch.bfloat16 if index == 0 else torch.float32
            a.grad = b.grad.to(a.grad_dtype)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        masters = optimizers[0].state[a]["master"], optimizers[1].state[b]["master"]
        torch.testing.assert_close(*masters, rtol=1e-6, atol=1e-6)


def test_stochastic_rounding_is_the_definition(device):
    p = parameters(torch.bfloat16, device, [(3,), (1025,)])
    peer = [torch.nn.Parameter(each.detach().float()) for each in p]
    optimizer = tapelm.AdamW(p, **SETTINGS, stochastic_seed=11)
    exact = tapelm.AdamW(peer, **SETTINGS)
    set_gradients(p)
    for a, b in zip(p, peer, strict=True):
        b.grad = a.grad.float()
    optimizer.step()
    exact.step()
    words = philox_reference(torch.arange(256 + 1025), torch.tensor(random_key(11, 1)))
    for a, b, first in zip(p, peer, (0, 256), strict=True):
        added = (words[first : first + a.numel()] & 0xFFFF).int()
        expected = ((b.detach().cpu().view(torch.int32) + added) & -65536).view(torch.float32)
        assert torch.equal(a.detach().cpu(), expected.bfloat16())


def test_stochastic_rounding_is_unbiased():
    """Steps far below the spacing of bfloat16 add up, where rounding to nearest would stand still."""
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = tapelm.AdamW([p], lr=1e-4, betas=(0.0, 0.0), weight_decay=0.0, stochastic_seed=1)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # 100 steps of 1e-4; a step rounds by at most 2**-8, of which 4096 elements leave a 64th.
    assert abs(float(p.detach().float().mean()) - 0.99) < 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_code_of_8_bits(signed):
    x = torch.randn(1000) * torch.rand(1000) ** 4
    x = x if signed else x.square()
    x[300:600] = 0.0
    codes, scale = quantize(x, signed)
    back = dequantize(codes, scale, signed)
    largest = torch.stack([block.abs().max() for block in x.split(256)]).repeat_interleave(256)[:1000]
    assert bool(((back - x).abs() <= 2.0**-4 * x.abs() + 2e-5 * largest).all())
    assert bool((back[x == 0] == 0).all()) and (signed or bool((back[x > 0] > 0).all()))
    # Every code is a fixed point.
    every = torch.arange(256, dtype=torch.uint8)
    again, one = quantize(dequantize(every, torch.tensor([0.75]), signed), signed)
    assert torch.equal(every, again) and one == 0.75


def test_second_moment_in_8_bits_moves(device):
    """At beta2 = 0.999 a step changes it by less than half the spacing of the code; on average it arrives."""
    p = torch.nn.Parameter(torch.zeros(4096, device=device))
    optimizer = tapelm.AdamW([p], betas=(0.9, 0.98), state_bits=8)
    gradient = torch.where(torch.arange(4096) % 256 == 0, 4.0, 1.0).to(device)
    for step in range(60):
        p.grad = gradient if step < 20 else torch.where(gradient > 1.0, gradient, 0.5)
        optimizer.step()
    state = optimizer.state[p]
    v = dequantize(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)[gradient == 1.0]
    exact = 0.0
    for step in range(60):
        exact = exact * 0.98 + (1.0 if step < 20 else 0.25) * 0.02
    assert abs(float(v.mean()) - exact) < 0.03 * exact


@pytest.mark.parametrize("shift", [1, 3], ids=lambda shift: f"{shift} elements")
def test_gradients_may_lie_anywhere(shift, dtype, device):
    """As DDP's buckets do, whose gradients lie one behind the other."""
    params = parameters(dtype, device, [(33,), (7, 5)])
    apart = copy.deepcopy(params)
    set_gradients(params)
    packed = torch.empty(100, dtype=dtype, device=device)
    for place, a, b in zip((shift, shift + 36), params, apart, strict=True):
        b.grad = packed[place : place + a.numel()].view(a.shape).copy_(a.grad)
        assert b.grad.data_ptr() % 16
    for each in (params, apart):
        tapelm.AdamW(each, max_grad_norm=0.5, **SETTINGS).step()
    assert all(torch.equal(a, b) for a, b in zip(params, apart, strict=True))


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone, and its mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_shards_are_updated_where_they_lie(dtype, one_rank):
    """A rank alone; several are in tests/gpt/test_parallel.py."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    whole = parameters(dtype, "cpu")[:1]
    cut = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), one_rank, [Shard(0)])) for p in whole]
    set_gradients(whole)
    for p, shard in zip(whole, cut, strict=True):
        shard.grad = distribute_tensor(p.grad, one_rank, [Shard(0)])
    optimizers = [tapelm.AdamW(each, max_grad_norm=0.1, **SETTINGS) for each in (whole, cut)]
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(cut[0].full_tensor(), whole[0])
    assert float(optimizers[0].grad_norm) == float(optimizers[1].grad_norm) > 0.1
    state = optimizers[1].state[cut[0]]
    assert isinstance(state["exp_avg"], DTensor) and state["exp_avg"].shape == whole[0].shape
    again = tapelm.AdamW(cut, max_grad_norm=0.1, **SETTINGS)
    again.load_state_dict(optimizers[1].state_dict())
    assert torch.equal(again.state[cut[0]]["exp_avg"].full_tensor(), state["exp_avg"].full_tensor())
    for wrong in ({"state_bits": 8}, {"stochastic_seed": 1}):
        with pytest.raises(ValueError, match="sharded params"):
            tapelm.AdamW(cut, **wrong)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinite_gradients_reach_the_parameter(device, bad, stored):
    p = parameters(torch.bfloat16, device, [(4100,)])[0]
    optimizer = tapelm.AdamW([p], **SETTINGS, **stored)
    for _ in range(2):
        set_gradients([p])
        p.grad[1000] = bad
        optimizer.step()
    found = ~p.detach().isfinite().cpu()
    assert bool(found[1000])
    # With 8 bits the whole block of 256 has lost its scale, and nothing else.
    expected = (
        torch.arange(4100) // 256 == 1000 // 256 if "state_bits" in stored else torch.arange(4100) == 1000
    )
    assert torch.equal(found, expected)


def test_states_are_converted():
    params = parameters(torch.bfloat16, "cpu", [(64, 100), (10,)])
    exact = tapelm.AdamW(params, **SETTINGS)
    train(exact, params, 3, seed=1)
    small = tapelm.AdamW(copy.deepcopy(params), **SETTINGS, state_bits=8, stochastic_seed=1)
    small.load_state_dict(exact.state_dict())
    state = small.state[small.param_groups[0]["params"][0]]
    assert "master" not in state and state["exp_avg"].dtype == torch.uint8 and state["step"] == 3
    assert small.param_groups[0]["stochastic_seed"] == 1
    back = tapelm.AdamW(copy.deepcopy(params), **SETTINGS)
    back.load_state_dict(small.state_dict())
    for p, q in zip(params, back.param_groups[0]["params"], strict=True):
        assert back.state[q]["exp_avg"].dtype == torch.float32
        assert torch.equal(back.state[q]["master"], p.float())
        for name in ("exp_avg", "exp_avg_sq"):
            expected, found = exact.state[p][name], back.state[q][name]
            assert float((found - expected).norm()) < 0.05 * float(expected.norm())
    assert back.param_groups[0]["stochastic_seed"] is None


def test_copies_keep_their_settings():
    params = parameters(torch.float32, "cpu", [(70, 70)])
    optimizer = tapelm.AdamW(params, **SETTINGS, max_grad_norm=0.5, state_bits=8)
    train(optimizer, params, 1, seed=1)
    other = copy.deepcopy(optimizer)
    twins = other.param_groups[0]["params"]
    train(optimizer, params, 2, seed=2)
    train(other, twins, 2, seed=2)
    assert torch.equal(params[0], twins[0])


@functools.cache
def final_loss(dtype, **chosen):
    """A small network learns a fixed function."""
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    student = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Tanh(), torch.nn.Linear(256, 32),
                                  torch.nn.Tanh(), torch.nn.Linear(32, 8)).to(dtype)  # fmt: skip
    optimizer = tapelm.AdamW(student.parameters(), lr=2e-3, max_grad_norm=1.0, **chosen)
    losses = []
    for _ in range(400):
        x = torch.randn(256, 32)
        loss = (student(x.to(dtype)).float() - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 5 * losses[-1]
    return sum(losses[-50:]) / 50


@pytest.mark.parametrize("stored", FORMATS[1:], indirect=True, ids=" ".join)
def test_converges_like_32_bits(dtype, stored):
    """The loss ends within 5% of that of 32 bits and masters."""
    assert abs(final_loss(dtype, **stored) / final_loss(dtype) - 1.0) < 0.05


def test_in_a_compiled_step():
    """It runs as it is, not compiled anew for every step count; where it must be in a graph, it says so."""
    model = torch.nn.Linear(8, 8)
    optimizer = tapelm.AdamW(model.parameters(), lr=0.1)

    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x = torch.randn(4, 8)
    compiled = torch.compile(step, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    losses = [float(compiled(x).detach()) for _ in range(12)]
    assert losses[-1] < losses[0] and optimizer.state[model.weight]["step"] == 12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "compiled anew at every step"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"tapelm\.AdamW\.step is not compiled"):
        torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)()


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
    settings = (torch.ones(()), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 7)
    check_registration("adamw_step_", some(), some(), some(), some(), [], [], [], [], *settings)
    codes, scales = ([torch.zeros(4, dtype=torch.uint8)], [torch.zeros(1)])
    eight_bits = (codes, [codes[0].clone()], [], scales, [scales[0].clone()], [0])
    check_registration("adamw_step_", some()[:1], some()[:1], *eight_bits, *settings)
    check_registration("adamw_state", torch.ones(3, 2), torch.uint8)


@pytest.mark.parametrize(
    "arguments,error,match",
    [
        ({"state_bits": 4}, ValueError, "32 or 8"),
        ({"stochastic_seed": 0.5}, TypeError, "stochastic_seed"),
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

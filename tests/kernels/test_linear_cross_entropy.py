import importlib
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tapelm
from tapelm.linear_cross_entropy import linear_cross_entropy_reference
from tapelm.testing import check_registration


def make(n, c, v, dtype, device="cpu"):
    hidden, weight, bias = (torch.randn(shape, dtype=dtype).to(device) for shape in ((n, c), (v, c), (v,)))
    return hidden, weight * 0.3, bias, torch.randint(0, v, (n,)).to(device)


@pytest.mark.parametrize("n,c,v", [(1, 1, 2), (5, 33, 17), (21, 16, 130), (5, 24, 4100)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(n, c, v, has_bias, dtype, device, check):
    hidden, weight, bias, targets = make(n, c, v, dtype, device)
    targets[: n // 3] = -100

    def op(hidden, weight, *bias):
        return tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias[0] if bias else None)

    def reference(hidden, weight, *bias):
        return linear_cross_entropy_reference(hidden, weight, targets, bias=bias[0] if bias else None)

    check(op, reference, hidden, weight, *((bias,) if has_bias else ()))


def test_many_chunks(monkeypatch, dtype, device, check):
    monkeypatch.setattr(importlib.import_module("tapelm.linear_cross_entropy"), "CHUNK_ELEMENTS", 128 * 40)
    hidden, weight, bias, targets = make(150, 8, 40, dtype, device)
    check(
        lambda h, w, b: tapelm.linear_cross_entropy(h, w, targets, bias=b, ignore_index=3),
        lambda h, w, b: linear_cross_entropy_reference(h, w, targets, bias=b, ignore_index=3),
        hidden, weight, bias,
    )  # fmt: skip


def test_loss_without_gradients_is_the_same(dtype, device):
    hidden, weight, bias, targets = make(20, 8, 40, dtype, device)
    with torch.no_grad():
        loss = tapelm.linear_cross_entropy(hidden.requires_grad_(), weight, targets, bias=bias)
    assert not loss.requires_grad
    assert loss.dtype == torch.float32
    assert torch.equal(loss, tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias).detach())


def test_upstream_gradient_scales(device):
    hidden, weight, _, targets = make(20, 8, 40, torch.float32, device)
    hidden.requires_grad_()
    (one,) = torch.autograd.grad(tapelm.linear_cross_entropy(hidden, weight, targets), hidden)
    (half,) = torch.autograd.grad(tapelm.linear_cross_entropy(hidden, weight, targets) / 2, hidden)
    assert torch.equal(one / 2, half)


@pytest.mark.parametrize("n,c,v", [(1, 1, 2), (21, 16, 130), (300, 24, 4100)])
def test_frozen_weight(n, c, v, dtype, device, check):
    hidden, weight, _, targets = make(n, c, v, dtype, device)
    targets[: n // 3] = -100
    check(
        lambda hidden: tapelm.linear_cross_entropy(hidden, weight, targets),
        lambda hidden: linear_cross_entropy_reference(hidden, weight.to(hidden.dtype), targets),
        hidden,
    )


def test_frozen_weight_gives_the_same_bits_and_fewer_flops(device):
    hidden, weight, _, targets = make(40, 16, 130, torch.float32, device)
    losses, gradients, flops = [], [], []
    for trains in (True, False):
        leaf = hidden.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            losses.append(tapelm.linear_cross_entropy(leaf, weight.requires_grad_(trains), targets))
        flops.append(counter.get_total_flops())
        (gradient,) = torch.autograd.grad(losses[-1], leaf)
        gradients.append(gradient)
    assert losses[0].item() == losses[1].item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert flops == [6 * 40 * 16 * 130, 4 * 40 * 16 * 130]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        leaf = hidden.clone().requires_grad_()
        loss = tapelm.linear_cross_entropy(leaf, weight, targets)
        torch.autograd.grad(loss**2, leaf, create_graph=True)[0].sum().backward()


def test_second_derivative_is_refused(device):
    """The gradients leave with the loss: but for this error they would count as constants."""
    hidden, weight, bias, targets = make(20, 8, 40, torch.float32, device)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
        loss = tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias)
        (gradient,) = torch.autograd.grad(loss**2, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            gradient.sum().backward()
        leaf.requires_grad_(False)


def test_leading_dimensions(device):
    hidden, weight, bias, targets = make(24, 8, 40, torch.float32, device)
    flat = tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias)
    folded = tapelm.linear_cross_entropy(hidden.view(2, 12, 8), weight, targets.view(2, 12), bias=bias)
    assert torch.equal(flat, folded)


def test_huge_logits_stay_finite(device):
    hidden, weight, _, targets = make(8, 16, 40, torch.float32, device)
    loss = tapelm.linear_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(
        loss, linear_cross_entropy_reference(hidden * 1e4, weight, targets), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("n", [0, 5])
def test_no_valid_target_is_nan_as_in_torch(n, device):
    hidden, weight, _, _ = make(n, 8, 40, torch.float32, device)
    targets = torch.full((n,), -100, device=device)
    assert tapelm.linear_cross_entropy(hidden, weight, targets).isnan()


@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_a_target_outside_the_vocabulary_is_not_learned(target, dtype, device, request):
    hidden, weight, bias, targets = make(7, 8, 40, dtype, device)
    targets[3], targets[5] = target, -100
    leaves = [each.requires_grad_() for each in (hidden, weight, bias)]
    if request.node.callspec.params["device"] == "cpu":
        with pytest.raises(IndexError):
            tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias)
        return
    loss = tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias)
    of_hidden, of_weight, of_bias = torch.autograd.grad(loss, leaves)
    assert loss.isnan() and of_weight.isnan().all() and of_bias.isnan().all()
    assert of_hidden.isnan().all(1).tolist() == [row == 3 for row in range(7)]
    assert (of_hidden[5] == 0).all()


def test_registration():
    hidden, weight, bias, targets = make(6, 4, 9, torch.float32)
    hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, bias))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments in (
        (hidden, weight, targets, bias, -100, True),
        (hidden, weight, targets, None, -100, True),
    ):
        overload = torch.ops.tapelm.linear_cross_entropy_forward.default
        # The gradient outputs are not differentiable, so the op is compiled in test_compiles instead.
        torch.library.opcheck(overload, arguments, test_utils=utils)
    check_registration(
        "linear_cross_entropy_forward", hidden.detach(), weight.detach(), targets, bias.detach(), -100, False
    )


def test_frozen_registration_and_compilation():
    hidden, weight, _, targets = make(6, 4, 9, torch.float32)
    hidden.requires_grad_()
    overload = torch.ops.tapelm.frozen_cross_entropy_forward.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(overload, (hidden, weight, targets, -100, True), test_utils=utils)
    check_registration("frozen_cross_entropy_forward", hidden.detach(), weight, targets, -100, False)
    compiled = torch.compile(tapelm.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(tapelm.linear_cross_entropy(hidden, weight, targets), hidden)
    (found,) = torch.autograd.grad(compiled(hidden, weight, targets), hidden)
    assert torch.equal(expected, found)


def test_compiles():
    hidden, weight, bias, targets = make(6, 4, 9, torch.float32)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    compiled = torch.compile(tapelm.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias), inputs)
    found = torch.autograd.grad(compiled(hidden, weight, targets, bias=bias), inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_flops():
    hidden, weight, _, targets = make(6, 4, 9, torch.float32)
    with FlopCounterMode(display=False) as counter:
        tapelm.linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == 2 * 6 * 4 * 9
    with FlopCounterMode(display=False) as counter:
        tapelm.linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets).backward()
    assert counter.get_total_flops() == 6 * 6 * 4 * 9


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda h, w, b, t: (h.double(), w.double(), t, b.double()), TypeError, r"hidden is torch\.float64"),
        (lambda h, w, b, t: (h, w.bfloat16(), t, b), TypeError, "weight is"),
        (lambda h, w, b, t: (h, w[:, :3], t, b), ValueError, "weight is"),
        (lambda h, w, b, t: (h, w, t.int(), b), TypeError, "targets are"),
        (lambda h, w, b, t: (h, w, t[:3], b), ValueError, "targets are"),
        (lambda h, w, b, t: (h, w, t.to("meta"), b), ValueError, "targets are on meta"),
        (lambda h, w, b, t: (h, w, t, b[:3]), ValueError, "bias is"),
    ],
)
def test_bad_arguments(change, error, match):
    hidden, weight, targets, bias = change(*make(6, 4, 9, torch.float32))
    with pytest.raises(error, match=match):
        tapelm.linear_cross_entropy(hidden, weight, targets, bias=bias)


def test_nothing_is_read_back_to_the_host(monkeypatch) -> None:
    """The launcher runs on tensors without values, which reading one would fail on."""
    module = importlib.import_module("tapelm.linear_cross_entropy")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **tile: None

    monkeypatch.setattr(module, "cross_entropy_kernel", Kernel())
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 128 * 40)
    inputs = [t.to("meta") for t in make(300, 8, 40, torch.bfloat16)]
    hidden, weight, bias, targets = inputs
    results = module.launch_linear_cross_entropy_forward(hidden, weight, targets, bias, -100, True)
    assert [t.device.type for t in results] == ["meta"] * 4
    with pytest.raises(RuntimeError):
        results[0].item()


def test_weight_gradients_of_chunks_are_summed_in_float32(monkeypatch, device) -> None:
    """Seven chunks in bfloat16 equal one to a rounding; sums rounded after each chunk would err four times as
    much: the first is large and the others are alike, so that each of them is rounded the same way."""
    hidden, weight, bias, targets = make(256, 4, 8, torch.bfloat16, device)
    hidden = torch.cat([64 * hidden[:128], hidden[128:].repeat(6, 1)])
    targets = torch.cat([targets[:128], targets[128:].repeat(6)])
    gradients = []
    for elements in (1 << 26, 128 * 8):
        monkeypatch.setattr(
            importlib.import_module("tapelm.linear_cross_entropy"), "CHUNK_ELEMENTS", elements
        )
        leaf = weight.detach().requires_grad_()
        loss = tapelm.linear_cross_entropy(hidden, leaf, targets, bias=bias)
        gradients.append(torch.autograd.grad(loss, leaf)[0].float())
    error = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    assert error <= 2.0**-8


def test_no_features_is_a_uniform_guess() -> None:
    targets = torch.zeros(5, dtype=torch.int64)
    loss = tapelm.linear_cross_entropy(torch.randn(5, 0), torch.randn(7, 0), targets)
    assert abs(loss.item() - math.log(7)) < 1e-6

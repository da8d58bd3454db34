import pytest
import torch

import tapelm
from tapelm.swiglu import swiglu_reference
from tapelm.testing import check_registration


def make(shape, dtype, device):
    return [(torch.randn(shape, dtype=dtype) * 3).to(device) for _ in range(2)]


@pytest.mark.parametrize("shape", [(1,), (5, 33), (2, 3, 64), (3, 2100), (127,), (191,)])
def test_values_and_gradients(shape, dtype, device, check):
    check(tapelm.swiglu, swiglu_reference, *make(shape, dtype, device))


def test_extreme_gates(dtype, device):
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30], dtype=dtype, device=device).requires_grad_()
    up = torch.full_like(gate, 2.0, requires_grad=True)
    y = tapelm.swiglu(gate, up)
    assert y.tolist() == [0.0, 0.0, 0.0, 0.0, 2 * gate[4].item(), 2 * gate[5].item()]
    dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    assert dgate.tolist() == [0.0, 0.0, 0.0, 1.0, 2.0, 2.0]
    assert dup.tolist() == [0.0, 0.0, 0.0, 0.0, gate[4].item(), gate[5].item()]


def test_relative_errors_of_every_gate() -> None:
    """Far below zero an error of the sigmoid is hidden from tolerances of the whole tensor."""
    for dtype, most in ((torch.float32, 2**-21), (torch.bfloat16, 2**-8 + 2**-12)):
        gate = torch.linspace(-80, 20, 200_001).to(dtype)
        wide = gate.double().requires_grad_()
        exact = torch.nn.functional.silu(wide)
        (slope,) = torch.autograd.grad(exact.sum(), wide)
        one = torch.ones_like(gate)
        y = torch.ops.tapelm.swiglu_forward(gate, one).double()
        dgate, dup = (t.double() for t in torch.ops.tapelm.swiglu_backward(one, gate, one))
        for ours, right in ((y, exact), (dup, exact)):
            assert ((ours - right).abs() <= most * right.abs()).all()
        assert ((dgate - slope).abs() <= most * (slope.abs() + exact.abs() / 2)).all()


def test_halves_of_a_fused_projection(dtype, device):
    fused = torch.randn(6, 2, 40, dtype=dtype).to(device)
    gate, up = fused[:, 0], fused[:, 1]
    assert torch.equal(tapelm.swiglu(gate, up), tapelm.swiglu(gate.contiguous(), up.contiguous()))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_zero_size(shape, dtype, device):
    gate, up = (t.requires_grad_() for t in make(shape, dtype, device))
    tapelm.swiglu(gate, up).sum().backward()
    assert gate.grad.shape == up.grad.shape == shape


def test_registration():
    gate, up = make((3, 5), torch.float32, "cpu")
    check_registration("swiglu_forward", gate.clone().requires_grad_(), up.clone().requires_grad_())
    check_registration("swiglu_forward", gate.t(), up.t())
    check_registration("swiglu_backward", torch.randn(3, 5), gate, up)


def test_compiles():
    inputs = [t.requires_grad_() for t in make((4, 6), torch.float32, "cpu")]
    compiled = torch.compile(tapelm.swiglu, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.swiglu(*inputs).sin().sum(), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda g, u: (g.double(), u.double()), TypeError, r"gate is torch\.float64"),
        (lambda g, u: (g, u.bfloat16()), TypeError, "up is"),
        (lambda g, u: (g, u[:1]), ValueError, "up is"),
        (lambda g, u: (g, u.to("meta")), ValueError, "up is on meta"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.swiglu(*change(*make((4, 6), torch.float32, "cpu")))

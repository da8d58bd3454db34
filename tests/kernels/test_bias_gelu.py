import pytest
import torch

import tapelm
from tapelm.bias_gelu import bias_gelu_reference
from tapelm.testing import check_registration


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 33), (2, 3, 7), (9, 600), (130, 16), (2, 31), (3, 63), (3, 127)]
)
def test_values_and_gradients(shape, dtype, device, check):
    x, bias = torch.randn(shape, dtype=dtype) * 3, torch.randn(shape[-1:], dtype=dtype)
    check(tapelm.bias_gelu, bias_gelu_reference, x.to(device), bias.to(device))


def test_far_from_zero(dtype, device):
    x = torch.tensor([-1e4, -50.0, -12.0, 12.0, 50.0, 1e4], dtype=dtype, device=device).requires_grad_()
    y = tapelm.bias_gelu(x, torch.zeros(6, dtype=dtype, device=device))
    y.sum().backward()
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(x.grad, (x > 0).to(dtype))


@pytest.mark.parametrize("columns", [1, 16, 160])  # parts of vectors, vectors, and several in turns
def test_at_infinity(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.tensor([-torch.inf, -3e38, -1e30, 1e30, 3e38, torch.inf], dtype=dtype, device=device)
    x = x[:, None].repeat(1, columns)
    y = torch.ops.tapelm.bias_gelu_forward(x, torch.zeros_like(x[0]))
    dx, dbias = torch.ops.tapelm.bias_gelu_backward(torch.ones_like(x), x, torch.zeros_like(x[0]))
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(dx, (x > 0).to(dtype))
    assert torch.equal(dbias, torch.full_like(x[0], 3))


def test_nan_stays(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.full((3, 33), torch.nan, dtype=dtype, device=device)
    assert torch.ops.tapelm.bias_gelu_forward(x, torch.zeros_like(x[0])).isnan().all()
    dx, dbias = torch.ops.tapelm.bias_gelu_backward(torch.ones_like(x), x, torch.zeros_like(x[0]))
    assert dx.isnan().all() and dbias.isnan().all()


def test_relative_errors_near_zero_and_below() -> None:
    """Tolerances of the whole tensor hide them; rounding 2 z, the exponent, costs ulp as it is large."""
    for dtype, unit in ((torch.float32, 2**-23), (torch.bfloat16, 2**-8 + 2**-12)):
        x = torch.linspace(-8, 8, 200_001).to(dtype)
        u = x.double()
        exponent = 2 * (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)
        exact = u * torch.sigmoid(exponent)
        y = torch.ops.tapelm.bias_gelu_forward(x[None], torch.zeros_like(x))[0].double()
        most = unit * (3 + 1.5 * exponent.abs()) if dtype == torch.float32 else unit + 2**-22 * exponent.abs()
        assert ((y - exact).abs() <= most * exact.abs()).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_zero_size(shape, dtype, device):
    x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
    bias = torch.zeros(shape[-1], dtype=dtype, device=device, requires_grad=True)
    tapelm.bias_gelu(x, bias).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_registration():
    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    check_registration("bias_gelu_forward", x, bias)
    check_registration("bias_gelu_forward", x.t()[:, :4], torch.randn(4))
    check_registration("bias_gelu_backward", torch.randn(4, 6), x.detach(), bias.detach())


def test_compiles():
    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    compiled = torch.compile(tapelm.bias_gelu, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.bias_gelu(x, bias).sum(), (x, bias))
    for a, b in zip(torch.autograd.grad(compiled(x, bias).sum(), (x, bias)), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_both():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tapelm.bias_gelu(torch.randn(2, 3).bfloat16(), torch.randn(3)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "x,bias,error,match",
    [
        (torch.randn(2, 3).double(), torch.randn(3).double(), TypeError, r"x is torch\.float64"),
        (torch.randn(2, 3), torch.randn(3).bfloat16(), TypeError, "bias is"),
        (torch.randn(2, 3), torch.randn(4), ValueError, "bias is"),
        (torch.randn(2, 3), torch.randn(1, 3), ValueError, "bias is"),
        (torch.randn(()), torch.randn(1), ValueError, "bias is"),
    ],
)
def test_bad_arguments(x, bias, error, match):
    with pytest.raises(error, match=match):
        tapelm.bias_gelu(x, bias)

import pytest
import torch

import tapelm
from tapelm.layer_norm import layer_norm_reference
from tapelm.testing import check_registration


def make(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return [
        t.to(device) for t in (x, torch.randn(shape[-1:], dtype=dtype), torch.randn(shape[-1:], dtype=dtype))
    ]


# 8200 columns are more than a Triton program holds: it walks them in blocks.
@pytest.mark.parametrize("shape", [(1, 3), (5, 33), (2, 3, 64), (70, 24), (3, 2100), (6, 8200)])
def test_values_and_gradients(shape, dtype, device, check):
    check(
        lambda x, w, b: tapelm.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: layer_norm_reference(x, w, b, 1e-5),
        *make(shape, dtype, device),
    )


@pytest.mark.parametrize("cols", [256, 9000])
def test_statistics_of_a_large_mean(cols, device):
    # A variance computed as E[x^2] - E[x]^2 would be lost here.
    x = torch.randn(4, cols, device=device) + 1e4
    one, zero = torch.ones(cols, device=device), torch.zeros(cols, device=device)
    expected = layer_norm_reference(x.double(), one.double(), zero.double())
    torch.testing.assert_close(tapelm.layer_norm(x, one, zero).double(), expected, rtol=0, atol=3e-3)


def test_statistics_are_float32(dtype, device):
    x, w, b = make((6, 40), dtype, device)
    y, mean, rstd = torch.ops.tapelm.layer_norm_forward(x, w, b, 1e-5)
    assert (y.dtype, mean.dtype, rstd.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(mean, x.float().mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, (x.float().var(-1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_zero_size(shape, dtype, device):
    x, w, b = (t.requires_grad_() for t in make(shape, dtype, device))
    tapelm.layer_norm(x, w, b).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_registration():
    x, w, b = (t.requires_grad_() for t in make((3, 5, 8), torch.float32, "cpu"))
    check_registration("layer_norm_forward", x, w, b, 1e-5)
    check_registration("layer_norm_forward", x.detach().transpose(0, 1), w, b, 1e-5)
    _, mean, rstd = (t.detach() for t in torch.ops.tapelm.layer_norm_forward(x, w, b, 1e-5))
    check_registration("layer_norm_backward", torch.randn(3, 5, 8), x.detach(), w.detach(), mean, rstd)


def test_compiles():
    inputs = [t.requires_grad_() for t in make((4, 6), torch.float32, "cpu")]
    compiled = torch.compile(tapelm.layer_norm, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.layer_norm(*inputs).sin().sum(), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_weights_to_the_input():
    x, w, b = make((4, 6), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tapelm.layer_norm(x.bfloat16(), w, b).dtype == torch.bfloat16
        assert tapelm.layer_norm(x, w, b).dtype == torch.float32


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda x, w, b: (x.double(), w.double(), b.double(), 1e-5), TypeError, r"x is torch\.float64"),
        (lambda x, w, b: (x, w.bfloat16(), b, 1e-5), TypeError, "weight is"),
        (lambda x, w, b: (x, w[:3], b, 1e-5), ValueError, "weight is"),
        (lambda x, w, b: (x, w, b[:3], 1e-5), ValueError, "bias is"),
        (lambda x, w, b: (x[0, 0], w, b, 1e-5), ValueError, "x has no dimension"),
        (lambda x, w, b: (x, w, b, 0.0), ValueError, "eps"),
        (lambda x, w, b: (x, w, b.to("meta"), 1e-5), ValueError, "bias is on meta"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.layer_norm(*change(*make((4, 6), torch.float32, "cpu")))

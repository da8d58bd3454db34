import pytest
import torch

import tapelm
from tapelm.rms_norm import rms_norm_reference
from tapelm.testing import check_registration


def make(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return [t.to(device) for t in (x, torch.randn(shape[-1:], dtype=dtype))]


# 8200 columns are more than a Triton program holds: it walks them in blocks.
@pytest.mark.parametrize("shape", [(1, 3), (5, 33), (2, 3, 64), (70, 24), (3, 2100), (6, 8200)])
def test_values_and_gradients(shape, dtype, device, check):
    check(
        lambda x, w: tapelm.rms_norm(x, w, 1e-5),
        lambda x, w: rms_norm_reference(x, w, 1e-5),
        *make(shape, dtype, device),
    )


def test_statistics_are_float32(dtype, device):
    x, w = make((6, 40), dtype, device)
    y, rstd = torch.ops.tapelm.rms_norm_forward(x, w, 1e-5)
    assert (y.dtype, rstd.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(rstd, (x.float().square().mean(-1) + 1e-5).rsqrt(), rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_in_its_row(dtype, device):
    x, w = make((4, 20), dtype, device)
    x[1, 3] = float("nan")
    y = tapelm.rms_norm(x, w)
    assert y.isnan().all(-1).tolist() == [False, True, False, False]
    assert not y[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_zero_size(shape, dtype, device):
    x, w = (t.requires_grad_() for t in make(shape, dtype, device))
    tapelm.rms_norm(x, w).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_registration():
    x, w = (t.requires_grad_() for t in make((3, 5, 8), torch.float32, "cpu"))
    check_registration("rms_norm_forward", x, w, 1e-5)
    check_registration("rms_norm_forward", x.detach().transpose(0, 1), w, 1e-5)
    rstd = torch.ops.tapelm.rms_norm_forward(x, w, 1e-5)[1].detach()
    check_registration("rms_norm_backward", torch.randn(3, 5, 8), x.detach(), w.detach(), rstd)


def test_compiles():
    inputs = [t.requires_grad_() for t in make((4, 6), torch.float32, "cpu")]
    compiled = torch.compile(tapelm.rms_norm, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.rms_norm(*inputs).sin().sum(), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_the_weight_to_the_input():
    x, w = make((4, 6), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tapelm.rms_norm(x.bfloat16(), w).dtype == torch.bfloat16
        assert tapelm.rms_norm(x, w).dtype == torch.float32


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda x, w: (x.double(), w.double(), 1e-5), TypeError, r"x is torch\.float64"),
        (lambda x, w: (x, w.bfloat16(), 1e-5), TypeError, "weight is"),
        (lambda x, w: (x, w[:3], 1e-5), ValueError, "weight is"),
        (lambda x, w: (x[0, 0], w, 1e-5), ValueError, "x has no dimension"),
        (lambda x, w: (x, w, 0.0), ValueError, "eps"),
        (lambda x, w: (x, w.to("meta"), 1e-5), ValueError, "weight is on meta"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.rms_norm(*change(*make((4, 6), torch.float32, "cpu")))

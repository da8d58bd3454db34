import pytest
import torch

import tapelm
from tapelm.add_norm import add_norm_reference
from tapelm.dropout import dropout_reference
from tapelm.testing import check_registration

SEED = 0x1234_5678_9ABC_DEF0


def make(shape, dtype, device):
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * 2 + 1
    weight, bias = torch.randn(shape[-1:], dtype=dtype), torch.randn(shape[-1:], dtype=dtype)
    return [t.to(device) for t in (x, residual, weight, bias)]


def run(x, residual, weight, bias, p):
    return torch.ops.tapelm.add_norm_forward(
        x, residual, weight, bias, 1e-5, p, torch.tensor(SEED, device=x.device)
    )[:2]


def reference(x, residual, weight, bias, p):
    return add_norm_reference(x, residual, weight, bias, 1e-5, p, torch.tensor(SEED, device=x.device))


# Widths that are no multiple of eight begin a row inside a counter of the random stream.
@pytest.mark.parametrize(
    "shape", [(4, 3), (9, 5), (5, 33), (2, 3, 64), (70, 26), (3, 2100), (5, 8200), (4, 8199)]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_values_and_gradients(shape, p, norm, dtype, device, check):
    if norm == "layer":
        inputs, arrange = make(shape, dtype, device), lambda *t: t
    else:
        inputs, arrange = make(shape, dtype, device)[:3], lambda *t: (*t, None)
    # Both outputs in one tensor: their gradients differ and reach every input.
    check(
        lambda *t: torch.cat(run(*arrange(*t), p)),
        lambda *t: torch.cat(reference(*arrange(*t), p)),
        *inputs,
    )


@pytest.mark.parametrize("cols", [8, 7, 8198])
def test_mask_is_that_of_dropout_bit_for_bit(cols, dtype, device):
    x, residual, weight, bias = make((9, cols), dtype, device)
    seed = torch.tensor(SEED, device=x.device)
    r = run(x, torch.zeros_like(residual), weight, bias, 0.4)[1]
    assert torch.equal(r, dropout_reference(x, 0.4, seed))
    x.requires_grad_()
    grad = torch.randn_like(residual)
    (dx,) = torch.autograd.grad(run(x, residual, weight, bias, 0.4)[1], x, grad)
    assert torch.equal(dx, dropout_reference(grad, 0.4, seed))


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone(output, device):
    inputs = [t.requires_grad_() for t in make((4, 24), torch.float32, device)]
    grad = torch.randn(4, 24, device=device)
    pairs = [function(*inputs, 0.3)[output] for function in (run, reference)]
    ours, expected = (torch.autograd.grad(y, inputs, grad, materialize_grads=True) for y in pairs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_public_functions_follow_the_generator(dtype, device):
    x, residual, weight, bias = make((6, 40), dtype, device)
    torch.manual_seed(3)
    first, again = (tapelm.add_layer_norm(x, residual, weight, bias, 1e-5, 0.5)[1] for _ in range(2))
    torch.manual_seed(3)
    y, r = tapelm.add_rms_norm(x, residual, weight, 1e-5, 0.5)
    assert torch.equal(r, first)
    assert not torch.equal(r, again)
    assert torch.equal(y, tapelm.rms_norm(r, weight, 1e-5))


def test_a_dropped_infinity_is_zero(device):
    x = torch.full((4, 1024), float("inf"), device=device)
    zero = torch.zeros_like(x)
    r = tapelm.add_rms_norm(x, zero, zero[0], 1e-5, 0.5)[1]
    assert set(r.unique().tolist()) == {0.0, float("inf")}


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_zero_size(shape, dtype, device):
    inputs = [t.requires_grad_() for t in make(shape, dtype, device)]
    y, r = tapelm.add_layer_norm(*inputs, 1e-5, 0.1)
    (y.sum() + r.sum()).backward()
    for t in inputs:
        assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("centred", [True, False])
def test_registration(p, centred):
    x, residual, weight, bias = (t.requires_grad_() for t in make((3, 5, 8), torch.float32, "cpu"))
    seed, bias = torch.tensor(9) if p else None, bias if centred else None
    check_registration("add_norm_forward", x, residual, weight, bias, 1e-5, p, seed)
    arguments = (x.transpose(0, 1), residual.transpose(0, 1), weight, bias, 1e-5, p, seed)
    y, r, mean, rstd = (t.detach() for t in torch.ops.tapelm.add_norm_forward(*arguments))
    grad_r = torch.randn(r.shape) if p else None
    arguments = (torch.randn(y.shape), grad_r, r, weight.detach(), mean if centred else None, rstd, p, seed)
    check_registration("add_norm_backward", *arguments)


def test_compiles():
    inputs = [t.requires_grad_() for t in make((4, 6), torch.float32, "cpu")]

    def loss(function):
        torch.manual_seed(2)
        y, r = function(*inputs, 1e-5, 0.5)
        return torch.autograd.grad(y.sin().sum() + r.cos().sum(), inputs)

    compiled = torch.compile(tapelm.add_layer_norm, fullgraph=True, backend="aot_eager")
    for a, b in zip(loss(compiled), loss(tapelm.add_layer_norm), strict=True):
        assert torch.equal(a, b)


def test_autocast_casts_to_the_residual():
    x, residual, weight, bias = make((4, 6), torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, r = tapelm.add_layer_norm(x.bfloat16(), residual, weight, bias)
        assert (y.dtype, r.dtype) == (torch.float32, torch.float32)
        y, r = tapelm.add_rms_norm(x, residual.bfloat16(), weight)
        assert (y.dtype, r.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda x, r, w, b: (x.double(), r, w, b), TypeError, r"x is torch\.float64"),
        (lambda x, r, w, b: (x, r.bfloat16(), w, b), TypeError, "residual is"),
        (lambda x, r, w, b: (x, r[:1], w, b), ValueError, "residual is"),
        (lambda x, r, w, b: (x, r, w[:3], b), ValueError, "weight is"),
        (lambda x, r, w, b: (x, r, w, b[:3]), ValueError, "bias is"),
        (lambda x, r, w, b: (x[0, 0], r[0, 0], w, b), ValueError, "x has no dimension"),
        (lambda x, r, w, b: (x, r, w, b, 0.0), ValueError, "eps"),
        (lambda x, r, w, b: (x, r, w, b, 1e-5, 1.0), ValueError, "dropout_p"),
        (lambda x, r, w, b: (x, r.to("meta"), w, b), ValueError, "residual is on meta"),
        (lambda x, r, w, b: (x, r, w, None), TypeError, "bias is None; pass zeros, or use add_rms_norm"),
        (lambda x, r, w, b: (x, None, w, b), TypeError, "residual is of type NoneType"),
        (lambda x, r, w, b: (x, r, [1.0], b), TypeError, "weight is of type list"),
        (lambda x, r, w, b: (x, r, w, b, 1e-5, "0.1"), TypeError, "dropout_p is of type str"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.add_layer_norm(*change(*make((4, 6), torch.float32, "cpu")))

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tapelm
from tapelm.linear import linear_reference
from tapelm.testing import check_op, check_registration


def make(rows, k, n, dtype, device="cpu"):
    return [torch.randn(shape, dtype=dtype).to(device) for shape in ((*rows, k), (n, k), (n,))]


ROWS = [((1,), 1, 1), ((5,), 33, 17), ((2, 3), 64, 48), ((70,), 100, 130), ((), 8, 3)]
FEW_ROWS = [((1,), 2053, 300), ((2,), 70, 5), ((1, 3), 33, 17), ((2, 2), 131, 9), ((4,), 1600, 6)]


@pytest.mark.parametrize("rows,k,n", ROWS + FEW_ROWS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(rows, k, n, has_bias, dtype, device, check):
    x, weight, bias = make(rows, k, n, dtype, device)
    check(tapelm.linear, linear_reference, *((x, weight, bias) if has_bias else (x, weight)))


# None is a multiple of a block. Several blocks of depth, with fewer rows than columns and the reverse, so
# that threads share either operand; ranges of shared rows, in the forward pass and for dweight; ranges of
# columns for dweight; and a depth that is summed in parts (in float32).
SEVERAL_BLOCKS = [
    (67, 1100, 201), (205, 1100, 67), (1040, 270, 1050), (70, 1100, 1040), (300, 1030, 1040), (64, 70001, 66),
]  # fmt: skip
one_device = pytest.mark.parametrize("device", ["cpu"])


@one_device
@pytest.mark.parametrize("rows,k,n", SEVERAL_BLOCKS)
def test_values_and_gradients_of_several_blocks(rows, k, n, dtype, device):
    check_op(tapelm.linear, linear_reference, *make((rows,), k, n, dtype), repeat=rows * k * n < 5e7)


@one_device
@pytest.mark.parametrize("rows,k,n", SEVERAL_BLOCKS)
def test_values_and_gradients_are_those_of_any_number_of_threads(rows, k, n, dtype, device, set_threads):
    x, weight, bias = make((rows,), k, n, dtype)
    grad = torch.randn(rows, n, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 16):
        set_threads(threads)
        y = torch.ops.tapelm.linear_forward(x, weight, bias)
        results.append((y, *torch.ops.tapelm.linear_backward(grad, x, weight, True)))
    for others in results[1:]:
        for mine, theirs in zip(results[0], others, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("rows", [1, 4, 70])
def test_views(rows, dtype, device):
    wide, transposed = torch.randn(rows, 2 * 37, dtype=dtype), torch.randn(37, 19, dtype=dtype)
    wide, transposed = wide.to(device), transposed.to(device)
    y = tapelm.linear(wide[:, ::2], transposed.t())
    torch.testing.assert_close(y, tapelm.linear(wide[:, ::2].contiguous(), transposed.t().contiguous()))


@pytest.mark.parametrize("rows,k,n", [((0,), 8, 3), ((4,), 0, 3), ((4,), 8, 0)])
def test_zero_size(rows, k, n, dtype, device):
    x, weight, bias = (t.requires_grad_() for t in make(rows, k, n, dtype, device))
    y = tapelm.linear(x, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    assert bias.grad.shape == bias.shape


def test_registration():
    x, weight, bias = (t.requires_grad_() for t in make((2, 3), 6, 5, torch.float32))
    check_registration("linear_forward", x, weight, bias)
    check_registration("linear_forward", x.detach().transpose(0, 1), weight, None)
    check_registration("linear_backward", torch.randn(2, 3, 5), x.detach(), weight.detach(), True)
    check_registration("linear_backward", torch.randn(2, 3, 5), x.detach(), weight.detach(), False)


def test_compiles():
    inputs = [t.requires_grad_() for t in make((4,), 6, 5, torch.float32)]
    compiled = torch.compile(tapelm.linear, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(tapelm.linear(*inputs).sin().sum(), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_flops():
    x, weight, bias = (t.requires_grad_() for t in make((2, 3), 6, 5, torch.float32))
    with FlopCounterMode(display=False) as counter:
        tapelm.linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 6 * (2 * 3) * 6 * 5


def test_autocast():
    x, weight, bias = (t.requires_grad_() for t in make((4,), 6, 5, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tapelm.linear(x, weight, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda x, w, b: (x.double(), w.double(), b.double()), TypeError, r"x is torch\.float64"),
        (lambda x, w, b: (x, w.bfloat16(), b), TypeError, "weight is"),
        (lambda x, w, b: (x, w[:, :3], b), ValueError, "weight is"),
        (lambda x, w, b: (x, w[0], b), ValueError, "weight is"),
        (lambda x, w, b: (x, w, b[:3]), ValueError, "bias is"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.linear(*change(*make((4,), 6, 5, torch.float32)))

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tapelm
from tapelm import roofline
from tapelm.lora_linear import lora_linear_reference, tile_config
from tapelm.nf4 import nf4_dequantize_reference
from tapelm.proofs.traffic import counted_traffic
from tapelm.testing import assert_close, check_registration, interpreted_triton

SCALING = 1.5
KINDS = ("dense", "nf4", "nested")
# rows, K, N, R; the last block of scales is partial, rows begin inside a block or inside a byte.
SHAPES = (
    ((1,), 1, 1, 1),
    ((5,), 33, 17, 3),
    ((2, 3), 64, 48, 4),
    ((70,), 100, 130, 16),
    ((33,), 192, 70, 40),
    ((), 8, 3, 2),
    ((3,), 1100, 5, 8),
    ((70,), 1030, 65, 64),  # two blocks of depth, the largest addend
    ((70,), 40, 33, 65),  # and one that is larger
)


def make(rows, k, n, r, kind, dtype, device="cpu", block_size=64):
    """x, weight, a, b; a and b as large as the base product makes them matter."""
    x, weight, a, b = (
        torch.randn(shape, dtype=dtype).to(device) for shape in ((*rows, k), (n, k), (r, k), (n, r))
    )
    if kind != "dense":
        weight = tapelm.nf4_quantize(weight, block_size, kind == "nested")
    return x, weight, a, b


def functions(weight):
    """Ours and the reference, of x, a and b."""
    both = tapelm.lora_linear, lora_linear_reference
    return [lambda x, a, b, op=op: op(x, weight, a, b, SCALING) for op in both]


@pytest.mark.parametrize("rows,k,n,r", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(rows, k, n, r, kind, dtype, device, check):
    x, weight, a, b = make(rows, k, n, r, kind, dtype, device)
    check(*functions(weight), x, a, b)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("rows,n", [(130, 70), (90, 130)])
@pytest.mark.parametrize("k", [256, 1024])
def test_values_and_gradients_of_whole_blocks_of_depth(k, rows, n, dtype, device, check):
    """The update is added in the last one, however full that is, for rows in several blocks."""
    x, weight, a, b = make((rows,), k, n, 3, "dense", dtype, device)
    check(*functions(weight), x, a, b)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("rows,k,n", [(130, 1100, 201), (205, 1100, 67), (1040, 270, 1050), (90, 333, 131)])
@pytest.mark.parametrize("kind", ["nf4", "nested"])
def test_values_and_gradients_are_those_of_the_unpacked_weight(rows, k, n, kind, dtype, device):
    """Panels of the weight are unpacked where a product packs them, in both of its orders."""
    x, weight, a, b = make((rows,), k, n, 5, kind, dtype, device)
    grad = torch.randn(rows, n).to(dtype)
    results = []
    for w in (weight, tapelm.nf4_dequantize(weight)):
        leaves = [t.detach().requires_grad_() for t in (x, a, b)]
        y = tapelm.lora_linear(leaves[0], w, leaves[1], leaves[2], SCALING)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_block_sizes(block_size, dtype, device, check):
    x, weight, a, b = make((9,), 256, 66, 4, "nested", dtype, device, block_size)
    check(*functions(weight), x, a, b)


def test_weight_in_several_parts():
    """More elements than the CPU dequantizes at a time, in rows and in columns."""
    x, weight, a, b = make((8,), 2050, 2100, 4, "nested", torch.float32)
    y, expected = (op(x, a, b) for op in functions(weight))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-3)
    x, weight, a, b = make((70,), 2050, 2100, 4, "nf4", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    ours, theirs = (torch.autograd.grad(op(*leaves).sum(), leaves) for op in functions(weight))
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.autograd.grad(functions(weight)[1](*exact_leaves).sum(), exact_leaves)
    for each in zip(ours, theirs, exact, strict=True):
        assert_close("gradient", torch.bfloat16, *each)


def test_a_very_deep_weight():
    """Whose product the CPU takes as a sum of several; the update goes with one of them."""
    x, weight, a, b = make((64,), 8320, 1030, 4, "dense", torch.bfloat16)
    ours, theirs = (op(x, a, b) for op in functions(weight))
    exact = functions(weight)[1](x.double(), a.double(), b.double())
    assert_close("value", torch.bfloat16, ours, theirs, exact)


@pytest.mark.parametrize("kind", ["nf4", "nested"])
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_few_rows(rows, kind, dtype):
    """Rows up to four have a kernel of their own on the CPU; its weight is not rounded to bfloat16."""
    x, weight, a, b = make((rows,), 2085, 37, 16, kind, dtype)
    ours, theirs = (op(x, a, b) for op in functions(weight))
    assert_close("value", dtype, ours, theirs, functions(weight)[1](x.double(), a.double(), b.double()))


@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("k", [64, 192, 2112])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows_of_whole_groups(rows, k, block_size, dtype):
    """Which the CPU reads in words of eight indices; blocks end in a row, at its end, or some rows later."""
    x, weight, a, b = make((rows,), k, 67, 16, "nested", dtype, block_size=block_size)
    ours, theirs = (op(x, a, b) for op in functions(weight))
    assert_close("value", dtype, ours, theirs, functions(weight)[1](x.double(), a.double(), b.double()))


@pytest.mark.parametrize("place", [0, 100, 191])
def test_what_is_not_finite_stays_in_its_row(place):
    x, dense, a, b = make((2,), 192, 5, 4, "dense", torch.float32)
    dense[2, place] = float("nan")
    weight = tapelm.nf4_quantize(dense, 64, double_quant=False)
    y = tapelm.lora_linear(x, weight, a, b, SCALING)
    assert y.isnan().any(0).tolist() == [False, False, True, False, False]
    x[1, place] = float("inf")
    y = tapelm.lora_linear(x, tapelm.nf4_quantize(dense.nan_to_num()), a, b, SCALING)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,k,n,r", [((0,), 8, 3, 2), ((4,), 0, 3, 2), ((4,), 8, 0, 2), ((9,), 8, 3, 0)])
def test_zero_size(rows, k, n, r, kind, dtype, device):
    x, weight, a, b = make(rows, k, n, r, kind, dtype, device)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    y = tapelm.lora_linear(x, weight, a, b, SCALING)
    torch.testing.assert_close(y, lora_linear_reference(x, weight, a, b, SCALING), rtol=0.02, atol=0.02)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_frozen(kind, device):
    x, weight, a, b = make((4,), 8, 6, 2, kind, torch.float32, device)
    if isinstance(weight, Tensor):
        weight.requires_grad_()
    assert not tapelm.lora_linear(x, weight, a, b, SCALING).requires_grad
    tapelm.lora_linear(x, weight, a.requires_grad_(), b, SCALING).sum().backward()
    assert getattr(weight, "grad", None) is None and a.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_registration(kind):
    x, weight, a, b = make((2, 3), 6, 5, 2, kind, torch.float32)
    packed, state = (weight, []) if isinstance(weight, Tensor) else (weight.packed, weight.state)
    for each in (x, a, b):
        each.requires_grad_()
    check_registration("lora_linear_forward", x, packed, state, 64, a, b, SCALING)
    check_registration("lora_linear_forward", x.detach().transpose(0, 1), packed, state, 64, a, b, SCALING)
    grad, u = torch.randn(2, 3, 5), torch.randn(6, 2)
    plain = [t.detach() for t in (x, a, b)]
    check_registration("lora_linear_backward", grad, plain[0], u, packed, state, 64, *plain[1:], SCALING)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles(kind):
    x, weight, a, b = make((4,), 6, 5, 2, kind, torch.float32)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return tapelm.lora_linear(x, weight, a, b, SCALING)

    def run_with(x: Tensor, weight, a: Tensor, b: Tensor) -> Tensor:
        return tapelm.lora_linear(x, weight, a, b, SCALING)

    expected = torch.autograd.grad(run(*leaves).sin().sum(), leaves)
    for y in (
        torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves),
        torch.compile(run_with, fullgraph=True, backend="aot_eager")(x, weight, a, b),
    ):
        for ours, theirs in zip(torch.autograd.grad(y.sin().sum(), leaves), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_flops(kind):
    """Forward: base, down, up. Backward: dx through base and up, v, dA and dB; no gradient of the weight."""
    x, weight, a, b = make((2, 3), 6, 5, 2, kind, torch.float32)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    with FlopCounterMode(display=False) as counter:
        tapelm.lora_linear(x, weight, a, b, SCALING).sum().backward()
    assert leaves and counter.get_total_flops() == 2 * 6 * (2 * 6 * 5 + 3 * 2 * (6 + 5))


@pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are not interpreted where a GPU runs them"
)
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_issues_what_its_tiles_say(backward):
    x, weight, a, b = make((256,), 128, 256, 16, "nested", torch.bfloat16)
    leaf = x.requires_grad_(backward)
    with interpreted_triton():
        with counted_traffic() as traffic:
            y = tapelm.lora_linear(leaf, weight, a, b, SCALING)
        if backward:
            with counted_traffic() as traffic:
                y.backward(torch.ones_like(y))
    blocks = (*tile_config(x.device, 2, backward)[:3], 16)
    expected = roofline.lora_linear_tiles((256, 256, 128, 16), blocks, 2, backward)
    assert (traffic.bytes, traffic.flops) == (expected.bytes, expected.flops)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    x, weight, a, b = make((4,), 6, 5, 2, kind, torch.float32)
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = tapelm.lora_linear(x, weight, a, b, SCALING)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad is not None and a.grad.dtype == torch.float32


def test_any_dtype_of_the_quantized_weight(device):
    x, weight, a, b = make((5,), 64, 7, 2, "nested", torch.bfloat16, device)
    y = tapelm.lora_linear(x.float(), weight, a.float(), b.float(), SCALING)
    dense = nf4_dequantize_reference(weight, torch.float32)
    torch.testing.assert_close(y, lora_linear_reference(x.float(), dense, a.float(), b.float(), SCALING))


@pytest.mark.parametrize(
    "change,error,match",
    [
        (
            lambda x, w, a, b: (x.double(), w.double(), a.double(), b.double()),
            TypeError,
            r"x is torch\.float64",
        ),
        (lambda x, w, a, b: (x, w.bfloat16(), a, b), TypeError, "weight is"),
        (lambda x, w, a, b: (x, w, a.bfloat16(), b), TypeError, "a is"),
        (lambda x, w, a, b: (x, w[:, :3], a, b), ValueError, "weight is"),
        (lambda x, w, a, b: (x, w[0], a, b), ValueError, "weight is"),
        (lambda x, w, a, b: (x, w, a[:, :3], b), ValueError, "a is"),
        (lambda x, w, a, b: (x, w, a, b[:3]), ValueError, "b is"),
        (lambda x, w, a, b: (x, tapelm.nf4_quantize(w[:, :3]), a, b), ValueError, "weight is"),
        (lambda x, w, a, b: (x, tapelm.nf4_quantize(w).to("meta"), a, b), ValueError, "weight is on meta"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.lora_linear(*change(*make((4,), 6, 5, 2, "dense", torch.float32)), SCALING)

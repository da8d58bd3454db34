import pytest
import torch

import tapelm
from tapelm.embedding import embedding_reference
from tapelm.testing import check_registration

SEED = 0x1234_5678_9ABC_DEF0


def make(ids_shape, vocabulary, places, width, dtype, device):
    ids = torch.randint(0, vocabulary, ids_shape)
    tokens, positions = torch.randn(vocabulary, width, dtype=dtype), torch.randn(places, width, dtype=dtype)
    return [t.to(device) for t in (ids, tokens, positions)]


def run(ids, tokens, positions, p):
    seed = torch.tensor(SEED, device=ids.device) if p else None
    return torch.ops.tapelm.embedding_forward(ids, tokens, positions, p, seed)


def reference(ids, tokens, positions, p):
    seed = torch.tensor(SEED, device=ids.device) if p else None
    return embedding_reference(ids, tokens, positions, p, seed)


# Few words, so that ids repeat; places beyond T, whose gradient is zero; widths that no eight divides.
@pytest.mark.parametrize(
    "ids_shape,vocabulary,places,width",
    [
        ((1, 1), 1, 1, 1),
        ((3, 5), 7, 5, 33),
        ((2, 3, 4), 50, 9, 64),
        ((40,), 3, 40, 26),
        ((2, 7), 11, 8, 1100),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_gradients(ids_shape, vocabulary, places, width, p, dtype, device, check):
    ids, *tables = make(ids_shape, vocabulary, places, width, dtype, device)
    for each in (ids, ids.int()):
        check(lambda t, q, e=each: run(e, t, q, p), lambda t, q: reference(ids, t, q, p), *tables)


def test_mask_is_that_of_dropout_bit_for_bit(dtype, device):
    ids, tokens, positions = make((3, 5), 4, 5, 24, dtype, device)
    ones, zeros = torch.ones_like(tokens), torch.zeros_like(positions)
    assert torch.equal(run(ids, ones, zeros, 0.4), reference(ids, ones, zeros, 0.4))


def test_values_are_rounded_as_torch_rounds_them(device):
    # Sums of two bfloat16: many ties, zeros, infinities, NaN and what overflows, in every variant of the CPU
    # kernels (test_isa.py). Denormals are left out: avx512bf16 takes them for zero.
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.38e38, -3.38e38])
    tokens = torch.cat([torch.randn(1003), special]).bfloat16().expand(2, -1).contiguous().to(device)
    positions = torch.cat([4.0 * torch.randn(1003), special]).bfloat16()[None].to(device)
    y = run(torch.tensor([[1]], device=device), tokens, positions, 0.0)
    torch.testing.assert_close(y[0, 0], tokens[1] + positions[0], rtol=0, atol=0, equal_nan=True)


def test_ids_of_other_strides(device):
    ids, tokens, positions = make((5, 3), 4, 5, 8, torch.float32, device)
    assert torch.equal(
        run(ids.t(), tokens, positions, 0.0), run(ids.t().contiguous(), tokens, positions, 0.0)
    )


def test_positions_continue(device):
    ids, tokens, positions = make((2, 6), 9, 6, 8, torch.float32, device)
    whole = tapelm.embedding(ids, tokens, positions)
    assert torch.equal(whole[:, 4:], tapelm.embedding(ids[:, 4:], tokens, positions[4:]))


def test_follows_the_generator(device):
    ids, tokens, positions = make((4, 8), 9, 8, 64, torch.float32, device)
    torch.manual_seed(3)
    first, again = (tapelm.embedding(ids, tokens, positions, 0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, tapelm.embedding(ids, tokens, positions, 0.5))
    assert not torch.equal(first, again)


@pytest.mark.parametrize("ids_shape,width", [((0, 4), 8), ((3, 0), 8), ((2, 3), 0)])
def test_zero_size(ids_shape, width, dtype, device):
    ids, *tables = make(ids_shape, 5, 4, width, dtype, device)
    tables = [t.requires_grad_() for t in tables]
    tapelm.embedding(ids, *tables, 0.1).sum().backward()
    for table in tables:
        assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_registration(p):
    ids, *tables = make((3, 5), 7, 6, 8, torch.float32, "cpu")
    seed = torch.tensor(9) if p else None
    check_registration("embedding_forward", ids, *(t.requires_grad_() for t in tables), p, seed)
    tables = [t.detach() for t in tables]
    check_registration("embedding_backward", torch.randn(3, 5, 8), ids, *tables, p, seed)


def test_compiles():
    ids, *tables = make((3, 5), 7, 6, 8, torch.float32, "cpu")
    tables = [t.requires_grad_() for t in tables]

    def gradients(function):
        torch.manual_seed(2)
        return torch.autograd.grad(function(ids, *tables, 0.5).sin().sum(), tables)

    compiled = torch.compile(tapelm.embedding, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(tapelm.embedding), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda i, t, q: (i, t.double(), q.double()), TypeError, r"tokens is torch\.float64"),
        (lambda i, t, q: (i, t, q.bfloat16()), TypeError, "positions is"),
        (lambda i, t, q: (i.float(), t, q), TypeError, "ids is"),
        (lambda i, t, q: (i[0, 0], t, q), ValueError, "ids has no dimension"),
        (lambda i, t, q: (i, t[0], q), ValueError, "tokens is"),
        (lambda i, t, q: (i, t, q[:, :3]), ValueError, "positions"),
        (lambda i, t, q: (i, t, q[:4]), ValueError, "positions has 4 rows"),
        (lambda i, t, q: (i + 7, t, q), ValueError, r"ids has \d+; tokens has 7 rows"),
        (lambda i, t, q: (i - 7, t, q), ValueError, "ids has -"),
        (lambda i, t, q: (i, t, q, 1.0), ValueError, "dropout_p"),
        (lambda i, t, q: (i, t.to("meta"), q.to("meta")), ValueError, "ids is on cpu"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        tapelm.embedding(*change(*make((3, 5), 7, 6, 8, torch.float32, "cpu")))

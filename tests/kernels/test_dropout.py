import numpy as np
import pytest
import torch

import tapelm
from tapelm._philox import keep_reference, keep_scale, philox_reference
from tapelm.dropout import dropout_reference
from tapelm.testing import check_registration

SEED = 0x1234_5678_9ABC_DEF0


def run(x, p, seed=SEED):
    return torch.ops.tapelm.dropout(x, p, torch.tensor(seed, device=x.device))


def test_philox_known_answers():
    # Random123's kat_vectors: counter 0 and key 0.
    words = philox_reference(torch.arange(4), torch.tensor(0)).tolist()
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4099,), (2, 3, 700)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_mask_is_philox_bit_for_bit(shape, p, dtype, device):
    x = torch.randn(shape, dtype=dtype).to(device)
    assert torch.equal(run(x, p), dropout_reference(x, p, torch.tensor(SEED, device=device)))


def test_mask_beyond_32_bit_groups():
    # Word 4 * 2**32 has a counter whose high word is 1.
    index = torch.tensor([2**34, 2**34 + 1, 0])
    words = philox_reference(index, torch.tensor(SEED)).tolist()
    assert len(set(words)) == 3


def test_elements_are_halves_of_words_in_memory_order():
    words = philox_reference(torch.arange(64), torch.tensor(SEED)).numpy().astype("<u4")
    numbers = torch.from_numpy(words.view("<u2").astype("int64"))
    assert torch.equal(keep_reference(torch.arange(128), 0.25, torch.tensor(SEED)), numbers >= 16384)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.99997, 0.9999999])
def test_mean_stays_for_every_probability(p):
    # The scale belongs to the probability in units of 2**-16 at which elements are dropped.
    q = min(65535, round(p * 65536)) / 65536
    assert keep_scale(p) == pytest.approx(1 / (1 - q), rel=1e-7)
    assert q == 0 or keep_scale(p) > 1
    y = run(torch.ones(2**21), p)
    share = float((y != 0).double().mean())
    assert abs(share - (1 - q)) < 6 * (q * (1 - q) / 2**21) ** 0.5 + 1e-12
    assert y[y != 0].unique().tolist() in ([keep_scale(p)], [])


def test_gradient_has_the_same_mask(dtype, device):
    x = torch.randn(130, dtype=dtype).to(device).requires_grad_()
    y = run(x, 0.4)
    grad = torch.randn(130, dtype=dtype).to(device)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(dx, dropout_reference(grad, 0.4, torch.tensor(SEED, device=device)))


def test_other_strides_and_zero_size(dtype, device):
    x = torch.randn(6, 10, dtype=dtype).to(device)
    assert torch.equal(run(x.t(), 0.4), run(x.t().contiguous(), 0.4))
    assert run(x[:0], 0.4).shape == (0, 10)


def test_rate_and_generator(device):
    x = torch.ones(40_000, device=device)
    torch.manual_seed(5)
    y, z = tapelm.dropout(x, 0.2), tapelm.dropout(x, 0.2)
    torch.manual_seed(5)
    assert torch.equal(y, tapelm.dropout(x, 0.2))
    assert not torch.equal(y, z)
    # Six standard deviations of the share that stays.
    assert abs(float((y > 0).float().mean()) - 0.8) < 6 * (0.8 * 0.2 / 40_000) ** 0.5
    assert torch.equal(y[y > 0].unique(), torch.tensor([65536 / 52429], device=device))  # 13107 / 65536 drop


def test_zero_probability_is_the_input():
    x = torch.randn(3)
    assert tapelm.dropout(x, 0.0) is x


def test_registration():
    check_registration("dropout", torch.randn(5, 3, requires_grad=True), 0.3, torch.tensor(9))
    check_registration("dropout", torch.randn(5, 3).t().bfloat16(), 0.3, torch.tensor(9))


def test_compiles():
    x = torch.randn(16, requires_grad=True)
    torch.manual_seed(2)
    y = torch.compile(tapelm.dropout, fullgraph=True, backend="aot_eager")(x, 0.5)
    y.sum().backward()
    assert torch.equal((y != 0), (x.grad != 0))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="p is"):
        tapelm.dropout(torch.randn(3), p)


def test_a_probability_may_be_a_scalar_of_numpy():
    assert tapelm.dropout(torch.randn(3), np.float32(0.5)).shape == (3,)


@pytest.mark.parametrize("x", [None, [1.0]])
def test_no_tensor(x):
    with pytest.raises(TypeError, match="x is of type"):
        tapelm.dropout(x, 0.5)


def test_bad_dtype():
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        tapelm.dropout(torch.randn(3).double(), 0.5)


def test_a_dropped_infinity_is_zero() -> None:
    y = tapelm.dropout(torch.full((4096,), float("inf")), 0.5)
    assert not y.isnan().any()
    assert 0 < (y == 0).sum() < 4096

import pytest
import torch

import tapelm
from tapelm.rope import rope_reference
from tapelm.testing import check_registration


def make(shape, kv_heads, dtype, device):
    batch, heads, time, width = shape
    q = torch.randn(batch, heads, time, width, dtype=dtype)
    k = torch.randn(batch, kv_heads, time, width, dtype=dtype)
    return q.to(device), k.to(device)


def tables(time, width, device, dtype=torch.float32, batch=None):
    """Unequal halves and rows that are no rotation: any table must be applied, and transposed in backward."""
    shape = (time, width) if batch is None else (batch, time, width)
    return tuple(torch.randn(shape).to(dtype).to(device) for _ in range(2))


def flat(pair):
    return torch.cat([t.flatten() for t in pair])


@pytest.mark.parametrize(
    "shape,kv_heads",
    [((1, 1, 1, 2), 1), ((2, 3, 5, 6), 1), ((2, 4, 37, 64), 2), ((1, 9, 3, 128), 9), ((1, 2, 4, 80), 2)],
)
@pytest.mark.parametrize("batched", [False, True])
def test_values_and_gradients(shape, kv_heads, batched, dtype, device, check):
    q, k = make(shape, kv_heads, dtype, device)
    cos, sin = tables(shape[2], shape[3], device, dtype, shape[0] if batched else None)
    check(
        lambda q, k: flat(tapelm.rope(q, k, cos, sin)),
        lambda q, k: flat(rope_reference(q, k, cos, sin)),
        q,
        k,
    )


def test_llama_angles(device):
    # Rotation keeps lengths, and scores depend on the distance of positions alone.
    angle = torch.outer(torch.arange(6.0), 10000.0 ** -(torch.arange(0, 16, 2) / 16)).repeat(1, 2)
    q, k = (torch.randn(16, device=device).expand(1, 1, 6, 16) for _ in range(2))
    q, k = tapelm.rope(q, k, angle.cos().to(device), angle.sin().to(device))
    torch.testing.assert_close(q.norm(dim=-1), q.norm(dim=-1)[..., :1].expand(1, 1, 6))
    scores = (q @ k.transpose(-2, -1))[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)


def test_backward_is_the_inverse_rotation(device):
    angle = torch.randn(5, 4).repeat(1, 2).to(device)
    q, k = make((2, 3, 5, 8), 1, torch.float32, device)
    rotated = tapelm.rope(q, k, angle.cos(), angle.sin())
    back = torch.ops.tapelm.rope(*rotated, angle.cos(), angle.sin(), True)
    torch.testing.assert_close(back, (q, k))


def test_views_of_a_fused_projection(dtype, device):
    fused = torch.randn(2, 7, 3, 4, 16, dtype=dtype).to(device)  # (B, T, 3, H, D)
    q, k, _ = fused.permute(2, 0, 3, 1, 4)
    assert q.stride(3) == 1
    assert not q.is_contiguous()
    cos, sin = tables(7, 16, device)
    expected = tapelm.rope(q.contiguous(), k.contiguous(), cos, sin)
    for a, b in zip(tapelm.rope(q, k, cos, sin), expected, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (1, 2, 0, 8), (1, 2, 3, 0)])
def test_zero_size(shape, dtype, device):
    q, k = (t.requires_grad_() for t in make(shape, 1, dtype, device))
    outputs = tapelm.rope(q, k, *tables(shape[2], shape[3], device))
    assert [t.shape for t in torch.autograd.grad(flat(outputs).sum(), (q, k))] == [q.shape, k.shape]


def test_registration():
    q, k = make((2, 3, 5, 8), 1, torch.float32, "cpu")
    check_registration("rope", q.clone().requires_grad_(), k.requires_grad_(), *tables(5, 8, "cpu"), False)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    check_registration("rope", strided, k.detach(), *tables(5, 8, "cpu", batch=2), True)


def test_compiles():
    q, k = (t.requires_grad_() for t in make((2, 3, 5, 8), 1, torch.float32, "cpu"))
    cos, sin = tables(5, 8, "cpu")
    compiled = torch.compile(tapelm.rope, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(flat(f(q, k, cos, sin)).sin().sum(), (q, k)) for f in (compiled, tapelm.rope)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change,error,match",
    [
        (lambda q, k, c, s: (q.double(), k, c, s), TypeError, r"q is torch\.float64"),
        (lambda q, k, c, s: (q, k.bfloat16(), c, s), TypeError, "k is"),
        (lambda q, k, c, s: (q, k, c.bfloat16(), s), TypeError, "cos is"),
        (lambda q, k, c, s: (q[..., :7], k[..., :7], c, s), ValueError, "even D"),
        (lambda q, k, c, s: (q, k[:, :, :4], c, s), ValueError, "k is"),
        (lambda q, k, c, s: (q, k, c[:4], s), ValueError, "cos is"),
        (lambda q, k, c, s: (q, k, c, s[None].expand(2, 5, 8)), ValueError, "sin is"),
        (lambda q, k, c, s: (q, k, c, s.to("meta")), ValueError, "sin is on meta"),
        (lambda q, k, c, s: (q, k, c, s.requires_grad_()), ValueError, "sin requires a gradient"),
    ],
)
def test_bad_arguments(change, error, match):
    q, k = make((2, 3, 5, 8), 1, torch.float32, "cpu")
    with pytest.raises(error, match=match):
        tapelm.rope(*change(q, k, *tables(5, 8, "cpu")))

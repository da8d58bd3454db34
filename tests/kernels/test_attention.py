import pytest
import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode

import tapelm
from tapelm._attention_kernels import _store
from tapelm.attention import attention_reference
from tapelm.proofs.bounds import checked_bounds
from tapelm.testing import check_registration, interpreted_triton

SEED = 2**40 + 12345

# B, Hq, Hkv, T, S, D, causal, dropout_p, documents
CASES = [
    (1, 1, 1, 1, 1, 16, True, 0.0, False),
    (2, 2, 2, 33, 33, 24, True, 0.0, False),
    (1, 2, 1, 70, 70, 64, True, 0.0, False),
    (1, 1, 1, 67, 67, 32, False, 0.0, False),
    (1, 2, 1, 36, 36, 1, True, 0.25, False),
    (2, 2, 1, 41, 41, 17, True, 0.1, True),
    (1, 1, 1, 65, 65, 40, False, 0.5, True),
    (1, 1, 1, 35, 35, 128, True, 0.0, True),
    (1, 1, 1, 18, 18, 256, True, 0.1, False),
    # More keys than queries: decoding, chunks of a prefill; other sequences, longer and shorter.
    (1, 6, 2, 1, 37, 24, True, 0.0, False),
    (2, 2, 1, 3, 68, 17, True, 0.0, False),
    (1, 2, 1, 23, 60, 20, True, 0.2, False),
    (2, 2, 1, 7, 71, 16, True, 0.1, True),
    (1, 2, 2, 19, 64, 16, False, 0.0, True),
    (1, 2, 1, 17, 41, 16, False, 0.0, False),
    (1, 2, 1, 41, 17, 16, False, 0.25, False),
]
LARGER_CASES = [
    (1, 3, 3, 200, 200, 64, True, 0.1, False),
    (1, 4, 2, 260, 260, 80, True, 0.0, True),
    (1, 4, 1, 130, 130, 96, False, 0.2, True),
    (1, 1, 1, 521, 521, 67, True, 0.1, False),
    (1, 2, 1, 300, 300, 32, False, 0.1, False),
    # Without dropout and documents most tiles need no mask: the loop that most models spend their time in.
    (1, 2, 1, 300, 300, 64, True, 0.0, False),
    (2, 4, 2, 520, 520, 128, True, 0.0, False),
    (1, 2, 2, 390, 390, 64, False, 0.0, False),
    (1, 1, 1, 260, 260, 256, True, 0.0, False),
    (2, 9, 3, 1, 1031, 64, True, 0.0, False),
    (1, 8, 8, 4, 517, 67, True, 0.0, False),
    (1, 3, 1, 2, 300, 256, False, 0.0, True),
    (1, 4, 2, 12, 2100, 96, True, 0.0, False),
    (2, 6, 2, 16, 700, 128, True, 0.0, True),
    (1, 2, 2, 57, 389, 64, True, 0.0, False),
    (1, 4, 2, 97, 331, 40, True, 0.1, True),
    (1, 2, 1, 64, 389, 64, True, 0.0, False),
    (1, 1, 1, 130, 131, 48, True, 0.0, False),
    (1, 2, 2, 200, 77, 32, False, 0.1, False),
]
# In the interpreter they take too long.
WITHOUT_INTERPRETER = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make(b, hq, hkv, t, d, dtype, device, s=None):
    # (B, T, H, D) storage seen as (B, H, T, D), as a model passes it; k and v have s rows.
    sizes = ((t, hq), (s or t, hkv), (s or t, hkv))
    return [torch.randn(b, rows, h, d, dtype=dtype).to(device).transpose(1, 2) for rows, h in sizes]


def documents_of(b, t, device):
    # Documents of uneven length that come back later in the row: ids need not be sorted.
    return ((torch.arange(t)[None] + 5 * torch.arange(b)[:, None]) // 19 % 3).int().to(device)


@pytest.mark.parametrize("b,hq,hkv,t,s,d,causal,p,documents", CASES)
def test_values_and_gradients(b, hq, hkv, t, s, d, causal, p, documents, dtype, device, check):
    seed, scale = torch.tensor(SEED, device=device) if p else None, 1.3 * d**-0.5
    ids = documents_of(b, s, device) if documents else None

    def op(q, k, v):
        return torch.ops.tapelm.attention_forward(q, k, v, causal, scale, p, seed, ids)[0]

    def reference(q, k, v):
        return attention_reference(
            q, k, v, causal=causal, scale=scale, dropout_p=p, seed=seed, document_ids=ids
        )

    check(op, reference, *make(b, hq, hkv, t, d, dtype, device, s))


@pytest.mark.parametrize("b,hq,hkv,t,s,d,causal,p,documents", LARGER_CASES)
@pytest.mark.parametrize("device", WITHOUT_INTERPRETER)
def test_values_and_gradients_of_many_tiles(b, hq, hkv, t, s, d, causal, p, documents, dtype, device, check):
    test_values_and_gradients(b, hq, hkv, t, s, d, causal, p, documents, dtype, device, check)


@pytest.mark.parametrize("hq,hkv", [(1, 1), (3, 3), (4, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_few_heads_are_shared_by_threads(hq, hkv, causal, dtype, set_threads):
    """One head is cut into tasks; only the sums of dq depend on how many there are."""
    inputs = [x.requires_grad_() for x in make(1, hq, hkv, 517, 48, dtype, "cpu")]
    grad, seed = torch.randn(1, hq, 517, 48).to(dtype), torch.tensor(SEED)

    def run(count):
        set_threads(count)
        out = torch.ops.tapelm.attention_forward(*inputs, causal, 0.2, 0.1, seed, None)[0]
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    one = run(1)
    for count in (2, 3):
        several = run(count)
        for index, (a, b, again) in enumerate(zip(one, several, run(count), strict=True)):
            assert torch.equal(b, again)
            if index == 1:
                torch.testing.assert_close(a, b)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("device", WITHOUT_INTERPRETER)
def test_documents_of_whole_blocks(order, causal, dtype, device, check):
    """Squares of keys and queries that are hidden, that need no mask and that need one."""
    T = 400
    ids = torch.repeat_interleave(torch.arange(8), torch.tensor([5, 128, 60, 67, 30, 33, 64, 13]))
    if order == "shuffled":
        ids = torch.cat([ids[200:264], ids[:128], ids[300:], ids[128:200], ids[264:300]])
    ids = ids.int()[None].to(device)

    def op(q, k, v):
        return torch.ops.tapelm.attention_forward(q, k, v, causal, 0.2, 0.0, None, ids)[0]

    def reference(q, k, v):
        return attention_reference(q, k, v, causal=causal, scale=0.2, document_ids=ids)

    check(op, reference, *make(1, 2, 1, T, 32, dtype, device))


@triton.jit
def rows_kernel(y_ptr, first, stride, time):
    row = first + tl.arange(0, 16)
    _store(y_ptr, tl.full([16, 16], 1.0, tl.float32), row, stride, time, 16, 16)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="interprets a kernel")
def test_rows_are_stored_beyond_two_billion_elements():
    """Of a long sequence with many heads; the tensor is never touched but for these rows."""
    time, stride = 2**15 + 16, 2**16
    y = torch.empty(time * stride, dtype=torch.int8)
    with interpreted_triton(), checked_bounds():
        rows_kernel[(1,)](y, 2**15, stride, time)
    assert (y.view(time, stride)[2**15 :, :16] == 1).all()


def test_log_sum_exp(device):
    q, k, v = make(1, 2, 2, 50, 16, torch.float32, device)
    lse = torch.ops.tapelm.attention_forward(q, k, v, True, 0.25, 0.0, None, None)[1]
    scores = (q.double() @ k.double().transpose(-1, -2) * 0.25).masked_fill(
        torch.ones(50, 50, dtype=torch.bool, device=device).triu(1), float("-inf")
    )
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_large_scores_stay_finite(device):
    q, k, v = make(1, 1, 1, 40, 16, torch.float32, device)
    out = tapelm.attention(q * 1e3, k * 1e3, v, scale=1.0)
    torch.testing.assert_close(out, attention_reference(q * 1e3, k * 1e3, v, scale=1.0), rtol=1e-3, atol=1e-3)


def test_default_is_torch_sdpa(device):
    q, k, v = make(2, 2, 2, 45, 16, torch.float32, device)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(tapelm.attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_documents_equal_separate_calls(device):
    q, k, v = make(1, 2, 1, 64, 16, torch.float32, device)
    ids = (torch.arange(64, device=device) >= 30).int()[None]
    whole = tapelm.attention(q, k, v, document_ids=ids)
    parts = [tapelm.attention(*(x[:, :, part] for x in (q, k, v))) for part in (slice(0, 30), slice(30, 64))]
    torch.testing.assert_close(whole, torch.cat(parts, 2), rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_generator(device):
    q, k, v = make(1, 2, 2, 40, 16, torch.float32, device)
    torch.manual_seed(3)
    first, second = (tapelm.attention(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, tapelm.attention(q, k, v, dropout_p=0.3))
    assert not torch.equal(first, second)


def test_output_is_heads_last_in_memory(device):
    out = tapelm.attention(*make(2, 3, 3, 10, 8, torch.float32, device))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 2, 8, 16), (2, 2, 1, 0, 16)])
def test_zero_size(shape, dtype, device):
    q, k, v = (x.requires_grad_() for x in make(*shape, dtype, device))
    out = tapelm.attention(q, k, v)
    assert out.shape == q.shape
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == x.shape


def test_registration():
    q, k, v = (x.requires_grad_() for x in make(1, 2, 1, 9, 8, torch.float32, "cpu"))
    check_registration("attention_forward", q, k, v, True, 0.3, 0.0, None, documents_of(1, 9, "cpu"))
    check_registration("attention_forward", q, k, v, False, 0.3, 0.5, torch.tensor(5), None)
    check_registration("attention_forward", q[:, :, :3], k, v, True, 0.3, 0.0, None, None)
    out, lse = (x.detach() for x in torch.ops.tapelm.attention_forward(q, k, v, True, 0.3, 0.0, None, None))
    q, k, v = q.detach(), k.detach(), v.detach()
    check_registration("attention_backward", out, q, k, v, out, lse, True, 0.3, 0.0, None, None)


def test_compiles():
    q, k, v = (x.requires_grad_() for x in make(1, 2, 1, 9, 8, torch.float32, "cpu"))
    compiled = torch.compile(tapelm.attention, fullgraph=True, backend="aot_eager")
    eager, out = tapelm.attention(q, k, v), compiled(q, k, v)
    assert torch.equal(eager, out)
    for a, b in zip(
        torch.autograd.grad(eager.sum(), (q, k, v)), torch.autograd.grad(out.sum(), (q, k, v)), strict=True
    ):
        assert torch.equal(a, b)
    assert compiled(q, k, v, dropout_p=0.5, document_ids=documents_of(1, 9, "cpu")).shape == q.shape


def test_flops_count_visible_pairs_only():
    q, k, v = (x.requires_grad_() for x in make(2, 4, 2, 32, 8, torch.float32, "cpu"))
    with FlopCounterMode(display=False) as counter:
        tapelm.attention(q, k, v).sum().backward()
    pairs = 2 * 4 * 32 * 33 // 2
    assert counter.get_total_flops() == (4 + 10) * pairs * 8
    with FlopCounterMode(display=False) as counter:
        tapelm.attention(q[:, :, :3], k, v).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * (30 + 31 + 32) * 8


def test_autocast_computes_in_bfloat16():
    q, k, v = make(1, 1, 1, 8, 16, torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tapelm.attention(q, k, v).dtype == torch.bfloat16


def test_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in make(1, 1, 1, 8, 16, torch.float32, "cpu"))
    (gradient,) = torch.autograd.grad(tapelm.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change,error,match",
    [
        (
            lambda a: a.update(q=a["q"].double(), k=a["k"].double(), v=a["v"].double()),
            TypeError,
            "q is torch.float64",
        ),
        (lambda a: a.update(k=a["k"].bfloat16()), TypeError, "k is torch.bfloat16"),
        (lambda a: a.update(q=a["q"][0]), ValueError, "q is"),
        (lambda a: a.update(v=a["v"][:, :, :5]), ValueError, "v is"),
        (lambda a: a.update(k=a["k"][:, :, :7], v=a["v"][:, :, :7]), ValueError, "k has 7 rows and q 8"),
        (lambda a: a.update(k=a["k"][:, :, :0], v=a["v"][:, :, :0], causal=False), ValueError, "no rows"),
        (lambda a: a.update(q=a["q"][:, :3]), ValueError, "k has 2 heads"),
        (lambda a: a.update(q=torch.randn(1, 1, 2, 257)), ValueError, r"1\.\.256"),
        (lambda a: a.update(dropout_p=1.0), ValueError, "dropout_p"),
        (lambda a: a.update(dropout_p=-0.1), ValueError, "dropout_p"),
        (lambda a: a.update(document_ids=torch.zeros(1, 8, dtype=torch.int64)), TypeError, "document_ids"),
        (lambda a: a.update(document_ids=torch.zeros(1, 7, dtype=torch.int32)), ValueError, "document_ids"),
        (lambda a: a.update(k=a["k"].to("meta")), ValueError, "k is on meta"),
    ],
)
def test_bad_arguments(change, error, match):
    arguments = dict(zip("qkv", make(1, 4, 2, 8, 16, torch.float32, "cpu"), strict=True))
    change(arguments)
    with pytest.raises(error, match=match):
        tapelm.attention(**arguments)


def test_a_nan_key_reaches_every_row_that_sees_it() -> None:
    """Also rows that see nothing else in its block of keys, whose maximum a NaN does not raise."""
    T, first = 130, 95
    q, k, v = (torch.randn(1, 1, T, 16) for _ in range(3))
    k[0, 0, first] = float("nan")
    documents = (torch.arange(T) >= first).int()[None]
    out = tapelm.attention(q, k, v, document_ids=documents)
    assert out.isnan().any(-1).sum().item() == T - first


def test_a_query_with_scores_of_minus_infinity_has_no_weights() -> None:
    """As in PyTorch's softmax the result is NaN, in this row alone."""
    q, k, v = (torch.rand(1, 1, 40, 16) + 0.1 for _ in range(3))
    q[0, 0, 21] = -float("inf")
    assert tapelm.attention(q, k, v).isnan().any(-1).nonzero()[:, -1].tolist() == [21]

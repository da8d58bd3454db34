import hashlib
import importlib.util
from math import prod

import pytest
import torch
from torch import Tensor

import tapelm
from tapelm._nf4_kernels import BLOCK_SIZES
from tapelm.nf4 import (
    NF4Weight,
    dynamic_map,
    nf4_dequantize_reference,
    nf4_quantize_reference,
)
from tapelm.testing import check_registration

SHAPES = ((1,), (64,), (3, 43), (7, 33), (64, 66), (2, 5, 129))


def parts(q: NF4Weight) -> list[Tensor]:
    return [q.packed, *q.state]


def weight(shape, dtype):
    """Values without a generator or rounding, so that every machine has the same, the mean of scales too."""
    i = torch.arange(prod(shape))
    return ((i * 7919 % 2003 - 1001) * (1 + i // 64 % 7) / 2.0**13).to(dtype).view(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_equals_the_reference(shape, block_size, double_quant, dtype, device):
    w = torch.randn(shape, dtype=dtype).to(device)
    q, expected = (
        quantize(w, block_size, double_quant) for quantize in (tapelm.nf4_quantize, nf4_quantize_reference)
    )
    for ours, theirs in zip(parts(q), parts(expected), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    y = tapelm.nf4_dequantize(q)
    assert y.dtype == dtype and torch.equal(y, nf4_dequantize_reference(q))


@pytest.mark.parametrize("shape", [*SHAPES, (0,)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_reference_stays_on_the_device_of_the_weight(shape, double_quant):
    """The meta device stands for a GPU: a value that is read from it raises."""
    q = nf4_quantize_reference(torch.empty(shape, device="meta"), 64, double_quant)
    assert {tensor.device.type for tensor in parts(q)} == {"meta"}


def test_many_nested_blocks(dtype, device):
    w = (torch.randn(257, 64) * torch.rand(257, 1)).to(dtype).to(device)
    q, expected = tapelm.nf4_quantize(w, 32), nf4_quantize_reference(w, 32)
    assert q.nested_absmax is not None and q.nested_absmax.shape == (3,)
    assert all(torch.equal(a, b) for a, b in zip(parts(q), parts(expected), strict=True))
    assert torch.equal(tapelm.nf4_dequantize(q), nf4_dequantize_reference(q))


@pytest.mark.parametrize("double_quant", [True, False])
def test_error_against_float64(double_quant, dtype, device):
    """The float64 value of the stored indices to one rounding, and w to half the widest gap between codes."""
    w = torch.randn(64, 100, dtype=dtype).to(device)
    q = tapelm.nf4_quantize(w, 64, double_quant)
    y, exact = tapelm.nf4_dequantize(q).double(), nf4_dequantize_reference(q, torch.float64)
    assert float((y - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
    absmax = w.double().flatten().view(-1, 64).abs().amax(1, keepdim=True)
    error = (exact - w.double()).flatten().view(-1, 64).abs() / absmax
    assert float(error.max()) <= 0.153 + (0.03 if double_quant else 0.0)


@pytest.mark.parametrize(
    "values",
    [[0.0] * 130, [0.0] * 3, [float("nan"), 1.0, 2.0] * 50, [float("inf"), -1.0] * 40, [1e-39] * 74],
    ids=["zeros", "few zeros", "nan", "inf", "denormal"],
)
def test_extreme_blocks(values, device):
    w = torch.tensor(values, device=device)
    q, expected = tapelm.nf4_quantize(w, 64, False), nf4_quantize_reference(w, 64, False)
    assert torch.equal(q.packed, expected.packed)
    torch.testing.assert_close(q.absmax, expected.absmax, rtol=0, atol=0, equal_nan=True)
    y = tapelm.nf4_dequantize(q)
    torch.testing.assert_close(y, nf4_dequantize_reference(q), rtol=0, atol=0, equal_nan=True)


def test_non_contiguous(dtype, device):
    w = torch.randn(40, 33, dtype=dtype).to(device)
    q, expected = tapelm.nf4_quantize(w.T), tapelm.nf4_quantize(w.T.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(parts(q), parts(expected), strict=True))


@pytest.mark.parametrize("double_quant", [True, False])
def test_zero_size(double_quant, dtype, device):
    q = tapelm.nf4_quantize(torch.empty(0, 8, dtype=dtype, device=device), 64, double_quant)
    assert tapelm.nf4_dequantize(q).shape == (0, 8)


# Made with bitsandbytes 0.50.2 on the CPU from weight(shape, dtype): SHA-256 of packed and absmax without
# double quantization; of packed, absmax, nested absmax and offset with it.
DIGESTS = {
    ((5, 61), torch.float32, 64): (
        "2fc65eb940253709d0e8ed691bf665566aa96c1bdc3ccf00cf2dce41a692cdf9",
        "8dcd7ca398736ab58bda17f81fd9bfaaaf9beb9bccbea0bc9fba26af346a37db",
    ),
    ((200, 150), torch.float32, 32): (
        "91b6ad76c868d2b8a771df08c35fde7743e545d9b1d73225d287d18a74784a20",
        "a5d45e2a66a34b2b7ab5b21d0948684ba6ebf66a9e88ae6f20489144f72b1735",
    ),
    ((200, 150), torch.bfloat16, 64): (
        "bfd0dae48a8be8e96f8f9264b3104a9eead08a8a4bff8288cc063f76a51df5c3",
        "44361105a3f8daa898a6849b2e4fb171ac6267cd7ceafb01ba3f9bc4733e886f",
    ),
    ((130, 1024), torch.float32, 256): (
        "900f5da320194594fcac6cbdad09bdb464715b77679e342882dc2f9520e88658",
        "af5f5cb6c00f72ea2f3729139d307a05f7577f0194bdb1a459876e143038a893",
    ),
}


def digest(*tensors: Tensor) -> str:
    data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("shape,dtype,block_size", DIGESTS)
def test_bytes_of_bitsandbytes_recorded(shape, dtype, block_size, device):
    w = weight(shape, dtype).to(device)
    plain, double = (tapelm.nf4_quantize(w, block_size, nested).to("cpu") for nested in (False, True))
    found = digest(*parts(plain)), digest(*parts(double)[:-1])
    assert found == DIGESTS[shape, dtype, block_size]


RECORDED = {
    "packed": "0feeddcba9876543221100ffeedccba9765433211100feeddcba987654322110"
    "0ffeeddcba9765433211100feeedcba9876543221100ffeeddcba9865443211107",
    "absmax": "00bff7",
    "nested_absmax": [0.1070963591337204],
    "quant_state.bitsandbytes__nf4": b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", '
    b'"shape": [3, 43], "nested_blocksize": 256, "nested_dtype": "float32", '
    b'"nested_offset": 0.2291666716337204}',
}


def recorded() -> tuple[Tensor, dict[str, Tensor]]:
    """A checkpoint of bitsandbytes: the packed weight and what lies beside it."""

    def array(data: bytes) -> Tensor:
        return torch.tensor(list(data), dtype=torch.uint8)

    entries = {
        "absmax": array(bytes.fromhex(RECORDED["absmax"])),
        "nested_absmax": torch.tensor(RECORDED["nested_absmax"]),
        "nested_quant_map": dynamic_map(),
        "quant_state.bitsandbytes__nf4": array(RECORDED["quant_state.bitsandbytes__nf4"]),
    }
    return array(bytes.fromhex(RECORDED["packed"]))[:, None], entries


def test_recorded_checkpoint():
    packed, entries = recorded()
    q = tapelm.nf4_quantize(weight((3, 43), torch.bfloat16))
    assert torch.equal(q.packed, packed)
    ours = q.as_dict()
    assert all(torch.equal(ours[name], entry) for name, entry in entries.items())
    for prefix in ("", "model.layers.0.self_attn.q_proj.weight."):
        again = NF4Weight.from_dict(packed, {prefix + name: entry for name, entry in entries.items()})
        assert (again.shape, again.dtype, again.block_size) == ((3, 43), torch.bfloat16, 64)
        assert torch.equal(tapelm.nf4_dequantize(again), tapelm.nf4_dequantize(q))


def test_bad_checkpoints():
    packed, entries = recorded()
    with pytest.raises(ValueError, match="no absmax"):
        NF4Weight.from_dict(packed, {"absmax": entries["absmax"]})
    with pytest.raises(ValueError, match="quant_map"):
        NF4Weight.from_dict(packed, entries | {"quant_map": torch.zeros(16)})
    other = torch.tensor(
        list(RECORDED["quant_state.bitsandbytes__nf4"].replace(b"256", b"512")), dtype=torch.uint8
    )
    with pytest.raises(ValueError, match="nested_blocksize"):
        NF4Weight.from_dict(packed, entries | {"quant_state.bitsandbytes__nf4": other})


@pytest.fixture(scope="module")
def bitsandbytes():
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: only its recorded bytes were compared")
    from bitsandbytes import functional

    return functional


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bytes_of_bitsandbytes(bitsandbytes, block_size, double_quant, dtype):
    for shape in ((100, 4096), (7, 33), (130, 258)):
        w = torch.randn(shape, dtype=dtype) * 0.02
        packed, theirs = bitsandbytes.quantize_4bit(
            w, quant_type="nf4", blocksize=block_size, compress_statistics=double_quant
        )
        q = tapelm.nf4_quantize(w, block_size, double_quant)
        state = [theirs.absmax]
        if double_quant:
            state += [theirs.state2.absmax, theirs.offset, theirs.state2.code]
        assert torch.equal(q.packed, packed)
        assert all(torch.equal(a, b) for a, b in zip(q.state, state, strict=True))
        # Where a row is shorter than a block, its AVX-512 kernel takes wrong scales.
        if shape[1] % block_size == 0 or shape[1] % 2:
            assert torch.equal(tapelm.nf4_dequantize(q), bitsandbytes.dequantize_4bit(packed, theirs))


@pytest.mark.parametrize("double_quant", [True, False])
def test_checkpoints_go_both_ways(bitsandbytes, double_quant, dtype):
    w = torch.randn(48, 128, dtype=dtype)
    packed, theirs = bitsandbytes.quantize_4bit(w, quant_type="nf4", compress_statistics=double_quant)
    entries = theirs.as_dict(packed=True)
    q = NF4Weight.from_dict(packed, entries)
    ours = tapelm.nf4_quantize(w, 64, double_quant).as_dict()
    assert ours.keys() == entries.keys()
    assert all(torch.equal(ours[name], entries[name]) for name in entries)
    back = bitsandbytes.QuantState.from_dict(dict(ours), device=torch.device("cpu"))
    assert torch.equal(bitsandbytes.dequantize_4bit(q.packed, back), tapelm.nf4_dequantize(q))


def test_deterministic(dtype, device):
    w = torch.randn(70, 130, dtype=dtype).to(device)
    first, second = tapelm.nf4_quantize(w), tapelm.nf4_quantize(w)
    assert all(torch.equal(a, b) for a, b in zip(parts(first), parts(second), strict=True))


@pytest.mark.parametrize("double_quant", [True, False])
def test_registration(double_quant):
    w = torch.randn(7, 33)
    q = tapelm.nf4_quantize(w, 64, double_quant)
    check_registration("nf4_quantize", w, 64, dynamic_map() if double_quant else None)
    check_registration("nf4_dequantize", q.packed, q.state, 64, [7, 33], torch.float32)


def test_compiles():
    def round_trip(w: Tensor) -> Tensor:
        return tapelm.nf4_dequantize(tapelm.nf4_quantize(w))

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    w = torch.randn(7, 33)
    assert torch.equal(compiled(w), round_trip(w))
    q = tapelm.nf4_quantize(w)
    alone = torch.compile(tapelm.nf4_dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(alone(q), tapelm.nf4_dequantize(q))


@pytest.mark.parametrize(
    "run,error,match",
    [
        (lambda w, q: tapelm.nf4_quantize(w.double()), TypeError, r"w is torch\.float64"),
        (lambda w, q: tapelm.nf4_quantize(w, 48), ValueError, "block_size is 48"),
        (lambda w, q: torch.ops.tapelm.nf4_quantize(w, 48, None), ValueError, "block_size"),
        (lambda w, q: dequantize(q, absmax=q.absmax[:1]), ValueError, "absmax must"),
        (lambda w, q: dequantize(q, packed=q.packed[1:]), ValueError, "packed must"),
        (lambda w, q: dequantize(q, absmax=q.absmax.float()), TypeError, "absmax is"),
        (lambda w, q: dequantize(q, map=None), ValueError, "state must"),
    ],
)
def test_bad_arguments(run, error, match, device):
    w = torch.randn(7, 33).to(device)
    with pytest.raises(error, match=match):
        run(w, tapelm.nf4_quantize(w))


def dequantize(q: NF4Weight, **changed) -> Tensor:
    names = ("packed", "absmax", "nested_absmax", "offset", "map", "shape", "dtype", "block_size")
    return tapelm.nf4_dequantize(NF4Weight(**({name: getattr(q, name) for name in names} | changed)))

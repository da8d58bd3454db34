"""Traffic and bounds of every Triton kernel in the interpreter; each proof catches what it is for."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.subjects import NOT_TRITON, SUBJECTS, Subject, random
from tapelm import _attention_configs as attention_configs
from tapelm import _attention_kernels, roofline
from tapelm._attention_configs import launch_config
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.attention import attention_reference
from tapelm.linear_cross_entropy import cross_entropy_kernel
from tapelm.proofs.bounds import OutOfBounds, between_guards, checked_bounds, owned
from tapelm.proofs.traffic import counted_traffic
from tapelm.testing import assert_close, interpreted_triton

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are not interpreted where a GPU runs them"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The package's attribute of this name is the public function.
attention_module = sys.modules["tapelm.attention"]


def named(subjects: list[Subject]) -> dict:
    return {"argvalues": subjects, "ids": [subject.launcher for subject in subjects]}


def flat(arguments: tuple) -> list[Tensor]:
    tensors = []
    for each in arguments:
        several = each if isinstance(each, list) else [each]
        tensors += [tensor for tensor in several if isinstance(tensor, Tensor)]
    return tensors


def test_every_launcher_is_a_subject() -> None:
    assert {subject.launcher for subject in SUBJECTS} == set(CUDA_LAUNCHERS) - set(NOT_TRITON)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subject", **named(list(SUBJECTS)))
def test_no_kernel_leaves_its_tensors(subject: Subject, dtype: torch.dtype) -> None:
    for shape in subject.odd:
        guarded = subject.arguments(random(dtype, between_guards), *shape)
        plain = subject.arguments(random(dtype), *shape)
        with interpreted_triton():
            with checked_bounds(flat(guarded)):
                results = CUDA_LAUNCHERS[subject.launcher](*guarded)
            expected = CUDA_LAUNCHERS[subject.launcher](*plain)
        # The guards hold NaN: a kernel that let one in would differ.
        results = results if isinstance(results, tuple) else (results,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, b in zip([*flat(results), *flat(guarded)], [*flat(expected), *flat(plain)], strict=True):
            assert torch.equal(a, b), shape


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("subject", **named([subject for subject in SUBJECTS if subject.large]))
def test_memory_traffic_is_the_minimum(subject: Subject, dtype: torch.dtype) -> None:
    """Each input once, each output once, within 5%."""
    assert subject.large is not None
    arguments = subject.arguments(random(dtype), *subject.large)
    least = roofline.minimum(subject.launcher, *arguments)
    with interpreted_triton(), counted_traffic() as traffic:
        CUDA_LAUNCHERS[subject.launcher](*arguments)
    assert traffic.memory_bytes() <= 1.05 * least.bytes, {
        name: (flow.loaded, flow.stored) for name, flow in traffic.flows.items()
    }
    assert traffic.memory_bytes() >= 0.99 * least.bytes, "something was not counted"
    assert traffic.flops == least.flops == 0


def attention_arguments(dtype: torch.dtype, *shape: int | str) -> tuple:
    return next(s for s in SUBJECTS if s.launcher == "attention_forward").arguments(random(dtype), *shape)


# (T, D, variant, S): as many keys as queries, a chunk at the end of more, and other keys.
LENGTHS = [(256, 64, ""), (256, 64, "full"), (128, 64, "", 384), (128, 64, "full", 64)]


@pytest.mark.parametrize("sizes", LENGTHS)
def test_attention_issues_what_its_tiles_say(sizes: tuple) -> None:
    arguments, variant = attention_arguments(BF16, 1, 2, 1, *sizes), sizes[2]
    q, k = arguments[:2]
    config = launch_config("forward", q.device, q.itemsize, 64, False, False)
    expected = roofline.attention_forward_tiles(
        q, k, variant != "full", config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_D"]
    )
    with interpreted_triton(), counted_traffic() as traffic:
        CUDA_LAUNCHERS["attention_forward"](*arguments)
    assert (traffic.bytes, traffic.flops) == (expected.bytes, expected.flops)
    least = roofline.minimum("attention_forward", *arguments)
    # Whole tiles on the diagonal are all that is multiplied in vain.
    assert least.flops <= traffic.flops <= (1.0 if variant == "full" else 1.5) * least.flops


@pytest.mark.parametrize("sizes", LENGTHS)
def test_attention_backward_issues_what_its_tiles_say(sizes: tuple) -> None:
    subject, variant = next(s for s in SUBJECTS if s.launcher == "attention_backward"), sizes[2]
    arguments = subject.arguments(random(BF16), 1, 2, 1, *sizes)
    q, k = arguments[1:3]
    tiles = {
        kernel: tuple(
            launch_config(kernel, q.device, q.itemsize, 64, False, False)[f"BLOCK_{x}"] for x in "MN"
        )
        for kernel in ("keys", "queries")
    }
    expected = roofline.attention_backward_tiles(q, k, variant != "full", tiles["keys"], tiles["queries"])
    with interpreted_triton(), counted_traffic() as traffic:
        CUDA_LAUNCHERS["attention_backward"](*arguments)
    assert (traffic.bytes, traffic.flops) == (expected.bytes, expected.flops)


ATTENTION = [subject for subject in SUBJECTS if subject.launcher.startswith("attention")]
# Rows aligned to 16 bytes, which tile copies need: grouped queries, T and D beyond the tiles, every variant.
ALIGNED = ((2, 4, 2, 67, 24), (1, 2, 2, 40, 40, "dropout"), (2, 2, 1, 67, 16, "documents"), (1, 1, 1, 1, 16),
           (1, 2, 1, 35, 64, "dropout documents full"), (1, 1, 1, 20, 72), (1, 2, 1, 9, 24, "documents", 40),
           (1, 2, 1, 3, 16, "", 70))  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("subject", **named(ATTENTION))
def test_tile_copies_are_the_pointer_loads(
    subject: Subject, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of sm_90 with tensor descriptors equals that of pointers bit for bit and stays in bounds."""
    used = []

    def operands(config: dict, *tiles: tuple) -> list:
        used.append(config["DESCRIPTORS"])
        return attention_configs.operands(config, *tiles)

    monkeypatch.setattr(attention_module, "operands", operands)
    monkeypatch.setattr(attention_configs, "DESCRIBED", {})  # the same tiles for both
    results = []
    for describable in (attention_configs.describable, lambda *tensors: False):
        monkeypatch.setattr(attention_module, "describable", describable)
        for shape in ALIGNED:
            arguments = subject.arguments(random(dtype, between_guards), *shape)
            with assumed_architecture("sm_90"), interpreted_triton(), checked_bounds():
                results += CUDA_LAUNCHERS[subject.launcher](*arguments)
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))
    assert used[: len(used) // 2] == [True] * (len(used) // 2) and not any(used[len(used) // 2 :])


@pytest.mark.parametrize("subject", **named(ATTENTION))
def test_tiles_shipped_for_tile_copies(subject: Subject) -> None:
    """With the larger tiles of sm_90 and sm_100 the kernels say what the C++ kernel does."""
    for architecture in ("sm_90", "sm_100"):
        for shape in (
            (1, 2, 1, 150, 64),
            (1, 1, 1, 140, 64, "dropout documents"),
            (1, 1, 1, 140, 128, "full"),
        ):
            ours = CUDA_LAUNCHERS[subject.launcher]
            with assumed_architecture(architecture), interpreted_triton():
                found = ours(*subject.arguments(random(BF16), *shape))
            expected = getattr(torch.ops.tapelm, subject.launcher)(*subject.arguments(random(BF16), *shape))
            for a, b in zip(found, expected, strict=True):
                error = float((a.double() - b.double()).abs().max())
                assert error <= 2.0**-6 * float(b.double().abs().max()), (architecture, shape)


@pytest.mark.parametrize("subject", **named(ATTENTION))
def test_tiles_of_other_documents_are_skipped(subject: Subject) -> None:
    """Two packed documents cost what the visible pairs of tiles cost; ids need not ascend."""
    counted = {}
    for name, ids in {
        "one": torch.zeros(128), "two": torch.arange(128) // 64, "descending": 1 - torch.arange(128) // 64,
        "interleaved": torch.arange(128) % 2,
    }.items():  # fmt: skip
        arguments = list(subject.arguments(random(FP32), 1, 1, 1, 128, 64, "documents full"))
        arguments[-1] = ids.int()[None]
        with interpreted_triton(), counted_traffic() as traffic:
            CUDA_LAUNCHERS[subject.launcher](*arguments)
        counted[name] = traffic.flops
    assert counted["two"] == counted["descending"] == counted["one"] / 2
    assert counted["interleaved"] == counted["one"]


@pytest.mark.parametrize("need_grad", [True, False])
def test_cross_entropy_reads_logits_once_a_pass(need_grad: bool) -> None:
    rows, vocabulary = 5, 5003
    logits = torch.randn(rows, vocabulary).bfloat16()
    targets, losses, valid = torch.arange(rows), torch.empty(rows), torch.tensor(rows)
    with interpreted_triton(), counted_traffic() as traffic:
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, valid, vocabulary, -100, NEED_GRAD=need_grad, BLOCK=4096
        )
    assert traffic.bytes == roofline.cross_entropy_rows(rows, vocabulary, 2, need_grad)


def test_traffic_of_a_known_kernel() -> None:
    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, counts_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
        m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
        a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
        tl.store(c_ptr + m * N + n, tl.dot(a, b, input_precision="ieee"), mask=n < 3)
        tl.atomic_add(counts_ptr + tl.program_id(0), 1)

    a, b, c = torch.randn(16, 32), torch.randn(32, 8), torch.zeros(16, 8)
    counts = torch.zeros(2, dtype=torch.int32)
    with counted_traffic() as traffic:
        product[(2,)](a, b, c, counts, M=16, N=8, K=32)
    assert traffic.flops == 2 * 2 * 16 * 8 * 32
    assert traffic.of("a_ptr").loaded == 2 * 16 * 32 * 4 and traffic.of("a_ptr").stored == 0
    assert traffic.of("a_ptr").footprint == 16 * 32 * 4
    assert traffic.of("c_ptr").stored == 2 * 16 * 3 * 4
    assert traffic.of("counts_ptr").loaded == traffic.of("counts_ptr").stored == 8
    # Rows of c are 32 bytes, of which 12 are written: each store touches 16 sectors.
    assert traffic.of("c_ptr").sectors == 2 * 16
    torch.testing.assert_close(c[:, :3], (a @ b)[:, :3])


def test_strided_loads_show_in_sectors() -> None:
    @triton.jit
    def column(x_ptr, y_ptr, STRIDE: tl.constexpr):
        at = tl.arange(0, 64)
        tl.store(y_ptr + at, tl.load(x_ptr + at * STRIDE))

    x, y = torch.randn(64, 16), torch.zeros(64)
    with counted_traffic() as traffic:
        column[(1,)](x, y, STRIDE=16)
    assert traffic.of("x_ptr").sectors == 64 and traffic.of("y_ptr").sectors in (8, 9)


def test_owned_elements_of_views() -> None:
    x = torch.zeros(2, 5, 4, 8)
    head = x[:, :, 1].transpose(0, 1)
    elements = {x[b, t, 1, d].data_ptr() for b in range(2) for t in range(5) for d in range(8)}
    addresses = torch.arange(-8, 4 * x.numel() + 8) + x.data_ptr()
    found = owned(head, addresses.numpy().astype("uint64"))
    assert set(addresses[torch.from_numpy(found)].tolist()) == elements
    assert owned(x[:0], addresses.numpy().astype("uint64")).sum() == 0


# Faults: what each proof is for, put in on purpose.


def rewritten(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with one place of its source changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{source.count(old)} places read {old!r}"
    path = folder / f"{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    # A name inside the package, so that its relative imports work.
    spec = importlib.util.spec_from_file_location(f"tapelm.broken_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    return broken


@triton.jit
def scaled_row_kernel(
    x_ptr, y_ptr, cols, scale, SHIFT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr
):
    col = tl.arange(0, BLOCK)
    at = tl.program_id(0) * cols + col
    x = tl.load(x_ptr + at + SHIFT, mask=col < cols + MASK, other=0.0)
    tl.store(y_ptr + at, x * scale, mask=col < cols)


def scaled_rows(x: Tensor, shift: int = 0, mask: int = 0) -> Tensor:
    y = torch.empty_like(x)
    scaled_row_kernel[(x.shape[0],)](x, y, x.shape[1], 0.5, SHIFT=shift, MASK=mask, BLOCK=64)
    return y


def test_fault_off_by_one_load() -> None:
    x = between_guards(torch.randn(3, 50))
    with checked_bounds():
        assert torch.equal(scaled_rows(x), x * 0.5)
    with (
        pytest.raises(
            OutOfBounds, match=r"program \(2, 0, 0\): load of x_ptr .* element offset 150; 1 of 50"
        ),
        checked_bounds(),
    ):
        scaled_rows(x, shift=1)


def test_fault_wrong_mask() -> None:
    """A mask one too wide reads the next row and, in the last, past the end; also the bytes are too many."""
    x = between_guards(torch.randn(3, 50))
    with pytest.raises(OutOfBounds, match="1 of 51 lanes"), checked_bounds():
        scaled_rows(x, mask=1)
    with counted_traffic() as traffic:
        scaled_rows(x, mask=1)
    assert traffic.of("x_ptr").loaded == 3 * 51 * 4 > x.numel() * 4


def test_fault_far_outside_is_not_mistaken_for_another_tensor() -> None:
    both = torch.randn(2, 3, 50)
    x, neighbour = both[0], both[1]
    with pytest.raises(OutOfBounds, match="x_ptr"), checked_bounds([neighbour]):
        scaled_rows(x, shift=150)


def test_fault_store_between_the_elements_of_a_view() -> None:
    fused = torch.randn(3, 2, 50)
    with pytest.raises(OutOfBounds, match="element offset 50"), checked_bounds():
        scaled_rows(fused[:, 0])


def test_fault_second_read_exceeds_the_minimum() -> None:
    @triton.jit
    def twice(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
        at = tl.program_id(0) * cols + tl.arange(0, BLOCK)
        largest = tl.max(tl.load(x_ptr + at), axis=0)
        tl.store(y_ptr + at, tl.load(x_ptr + at) - largest)

    x, y = torch.randn(128, 512), torch.empty(128, 512)
    with counted_traffic() as traffic:
        twice[(128,)](x, y, 512, BLOCK=512)
    assert traffic.memory_bytes() == 1.5 * 2 * x.numel() * 4


def attention_error(arguments: tuple) -> None:
    """Compares the interpreted forward kernel with float64."""
    exact, theirs = (
        attention_reference(*(x.to(kind) for x in arguments[:3])) for kind in (torch.float64, FP32)
    )
    with interpreted_triton():
        ours = CUDA_LAUNCHERS["attention_forward"](*arguments)[0]
    assert_close("value", FP32, ours, theirs, exact)


@pytest.mark.parametrize(
    "old,new",
    [
        ("scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)",
         "scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * _LOG2E"),
        ("(s < keys) & (s <= position)", "(s < keys) & (s < position)"),
    ],
    ids=["dropped scale", "causal mask off by one"],
)  # fmt: skip
def test_fault_in_the_values(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is out of bounds, but the values no longer agree with float64."""
    arguments = attention_arguments(FP32, 1, 1, 1, 40, 16)
    attention_error(arguments)
    broken = rewritten(_attention_kernels, old, new, tmp_path)
    monkeypatch.setattr(attention_module, "attention_forward_kernel", broken.attention_forward_kernel)
    with pytest.raises(AssertionError, match=r"value: (largest error|not finite)"):
        attention_error(arguments)


@pytest.mark.parametrize(
    "old,new",
    [
        ("inside = (row[:, None] < time) & (col[None, :] < D)\n        return",
         "inside = (row[:, None] <= time) & (col[None, :] < D)\n        return"),
        ("stride + col[None, :], mask=inside, other=0.0",
         "stride + col[None, :] + 1, mask=inside, other=0.0"),
    ],
    ids=["mask too wide", "off by one"],
)  # fmt: skip
def test_fault_in_the_addresses(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read memory that exists, another head of the fused projection: only the checker sees it."""
    arguments = attention_arguments(FP32, 1, 2, 2, 40, 16)
    broken = rewritten(_attention_kernels, old, new, tmp_path)
    monkeypatch.setattr(attention_module, "attention_forward_kernel", broken.attention_forward_kernel)
    with pytest.raises(OutOfBounds, match=r"load of (q|k)_ptr"), interpreted_triton(), checked_bounds():
        CUDA_LAUNCHERS["attention_forward"](*arguments)

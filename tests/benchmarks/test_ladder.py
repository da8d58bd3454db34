"""Rungs by a fake clock, and the GPT's own rungs on a model of a few thousand parameters."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from benchmarks import gpt_ladder, ladder, table_kinds, train
from benchmarks.gpt_ladder import KERNELS, MasterAdamW, Place, Setting, ops_of
from benchmarks.harness import WrongResult, relative_error
from benchmarks.ladder import Ascent, Ladder, Rung, climb
from benchmarks.sweeps import error_of_median
from gpt.cli import UserError
from gpt.config import PRESETS
from gpt.ops import PLAIN, load_ops

CPU = torch.device("cpu")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 320}


class FakeStep:
    label, shape, dtype, tokens, flops = "fake", "1 x 1", torch.float32, 10, 1e-9

    def __init__(self, run, loss: float = 2.0) -> None:
        self.run, self.loss, self.losses = run, loss, []

    def __call__(self) -> None:
        self.run()
        self.losses.append(torch.tensor(self.loss))

    def evaluate(self) -> float:
        return self.loss


def rung(clock, name: str, seconds: float, kind="step", loss: float = 2.0) -> Rung:
    return Rung(name, lambda: FakeStep(clock.taking(seconds), loss), kind)


def test_slow_rounds_and_slow_steps_move_no_gain() -> None:
    own, rounds = {"plain": 8.0, "a": 4.0, "b": 2.0, "c": 1.9, "d": 1.0}, (1.0, 1.4, 0.9)
    seconds = {name: [each * factor for factor in rounds] for name, each in own.items()}
    for at, name in enumerate(("a", "b", "d")):
        seconds[name][at] *= 1.3
    found = ladder.polished(seconds)
    gains = [math.exp(found[before] - found[name]) for before, name in itertools.pairwise(own)]
    assert gains == pytest.approx([2.0, 2.0, 2 / 1.9, 1.9], rel=1e-6)


def test_gains_of_noisy_rounds_multiply_to_the_whole() -> None:
    """Twelve rungs, three rounds of 5% noise: medians of ratios multiply to up to a fifth more or less."""
    generator = torch.Generator().manual_seed(0)
    names, worst = [str(number) for number in range(12)], {"polished": 1.0, "medians": 1.0}
    for _ in range(50):
        noise = (0.05 * torch.randn(len(names), 3, generator=generator)).exp().tolist()
        seconds, product = dict(zip(names, noise, strict=True)), 1.0
        for before, name in itertools.pairwise(names):
            product *= statistics.median(a / b for a, b in zip(seconds[before], seconds[name], strict=True))
        own = ladder.polished(seconds)
        found = {"polished": math.exp(own[names[0]] - own[names[-1]]), "medians": product}
        worst = {kind: max(worst[kind], found[kind], 1 / found[kind]) for kind in worst}
    assert worst["polished"] < 1.12 < 1.2 < worst["medians"]


def test_gains_multiply_to_the_whole_and_branches_are_left_out(clock) -> None:
    rungs = [
        rung(clock, "plain", 8.0),
        rung(clock, "a", 4.0),
        rung(clock, "branch", 40.0, "branch"),
        rung(clock, "b", 1.0),
        rung(clock, "memory", 2.0, "memory"),
    ]
    removed = [rung(clock, "without a", 3.0)]
    result = climb(Ladder("x", rungs, removed), CPU, 3, memory=False)
    gains = [row.ratio_vs["before"] for row in result.rows]
    assert gains == pytest.approx([1, 2, 0.1, 4, 0.5], rel=1e-3)
    assert result.product == pytest.approx(8, rel=1e-3) and result.unexplained() < 1e-3
    assert [row.ratio_vs["b"] for row in result.removed] == pytest.approx([1, 1 / 3], rel=1e-3)
    assert result.rows[3].extra["tokens_per_second"] == pytest.approx(10, rel=1e-3)
    assert len(result.losses["a"]) == ladder.WARM_UP + 3


def test_rounds_in_parts_count_what_changes_between_them(clock) -> None:
    """A rung that has become slower minutes later: the middle ratio, and an error that tells."""
    pace = {"ours": 0.1}

    def ours() -> None:
        clock.now += pace["ours"]

    rungs = [
        rung(clock, "plain", 0.6),
        Rung("ours", lambda: FakeStep(ours)),
        Rung("twice", lambda: FakeStep(lambda: (ours(), ours()))),
        rung(clock, "same", 0.6),
    ]
    ascent = Ascent(Ladder("x", rungs), CPU, 9, parts=3)
    for count, pace["ours"] in enumerate((0.1, 0.2, 0.3), 1):
        ascent.part()
        assert len(ascent.so_far().seconds["plain"]) == 3 * count
    assert ascent.so_far().rows[1].ratio_vs["plain"] == pytest.approx(3.0, rel=1e-3)
    rows = ascent.finish(memory=False).rows
    error = error_of_median([6.0, 3.0, 2.0])
    assert rows[1].ratio_vs["plain"] == pytest.approx(3.0, rel=1e-3)
    assert [rows[n].extra["ratio_error"] for n in (1, 2)] == pytest.approx([error, error], rel=1e-3)
    assert rows[1].extra["gain_error"] == pytest.approx(error, rel=1e-3)
    assert rows[2].extra["gain_error"] < 1e-3  # against the rung before, which became slower as it did
    assert rows[3].ratio_vs["plain"] == pytest.approx(1.0, rel=1e-3)
    assert rows[3].extra["ratio_error"] < 1e-3


def test_rounds_of_one_part_have_the_error_of_their_spread(clock) -> None:
    times = [0.1, 0.1, 0.12, 0.11, 0.09, 0.1, 0.1]
    pending = iter(times)

    def ours() -> None:
        clock.now += next(pending)

    ladder = Ladder("x", [rung(clock, "plain", 0.6), Rung("ours", lambda: FakeStep(ours))])
    result = climb(ladder, CPU, 6, memory=False)
    ratios = [0.6 / seconds for seconds in result.seconds["ours"]]
    assert result.rows[1].extra["ratio_error"] == pytest.approx(relative_error(ratios), rel=1e-2)


def test_parts_have_orders_of_their_own(clock) -> None:
    taken: list[str] = []
    rungs = [Rung(name, lambda name=name: FakeStep(lambda: taken.append(name))) for name in "abcdefgh"]
    ascent = Ascent(Ladder("x", rungs), CPU, 2, parts=2)
    taken.clear()
    ascent.part()
    ascent.part()
    assert sorted(taken[:8]) == sorted(taken[8:]) and taken[:8] != taken[8:]
    assert Ascent(Ladder("x", rungs), CPU, 1, parts=3).left == 1


def test_losses_are_of_steps_that_all_have_taken() -> None:
    losses = {"a": [9.0, 1.0, 2.0, 3.0, 7.0, 7.0], "b": [9.0, 1.0, 2.0, 4.0]}
    assert ladder.late_loss(losses, "a", 2) == 2.5 and ladder.late_loss(losses, "b", 2) == 3.0


def test_a_rung_with_another_loss_is_not_timed(clock) -> None:
    rungs = [rung(clock, "plain", 1.0), rung(clock, "bad", 1.0, loss=2.1)]
    with pytest.raises(WrongResult, match=r"bad: loss 2\.1"):
        climb(Ladder("x", rungs), CPU, 3, memory=False)


def test_settings_take_what_they_name_from_tapelm() -> None:
    ours = load_ops("optimized")
    plain = ops_of(Setting("fp32"))
    assert plain.attention is PLAIN.attention and plain.adamw is PLAIN.adamw
    assert ops_of(Setting("fp32", attention="sdpa")).attention is gpt_ladder.sdpa
    everything = ops_of(Setting("bf16", kernels=frozenset(KERNELS), adamw="tapelm"))
    for name in ("layer_norm", "add_norm", "embedding", "linear", "cross_entropy", "adamw"):
        assert getattr(everything, name) is getattr(ours, name), name
    assert ops_of(Setting("bf16", adamw="torch masters")).adamw is MasterAdamW


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(gpt_ladder, "own_text", lambda: ["the quick brown fox jumps. " * 60] * 4)
    return Place("tiny", 2, "cpu", gpt_ladder.prepare(tmp_path, 300))


def test_every_rung_of_the_gpt_has_the_same_loss(
    tiny: Place, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And trains alike: after three steps on the same text the losses are equal to rounding of bf16."""
    torch.manual_seed(0)
    request = ladder.Request("tiny", 2, CPU, None, compiled=False)
    settings = gpt_ladder.build(request, tmp_path_factory.mktemp("text"))
    expected = None
    for each in (*settings.rungs, *settings.removals):
        step = each.build()
        before = step.evaluate()
        for _ in range(3):
            step()
        found = torch.tensor([before, *map(float, step.losses), step.evaluate()])
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=0, msg=each.name)
    assert any("no-compiled" in line for line in settings.skipped)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_removal_finds_its_line_in_the_table(
    precision: str, tiny: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt_ladder, "pick_precision", lambda *arguments: precision)
    built = gpt_ladder.build(ladder.Request("tiny", 2, CPU), tmp_path)
    lines, removals = ([each.name for each in part] for part in (built.rungs, built.removals))
    found = {name: table_kinds.line_of(name.removeprefix("without "), lines) for name in removals}
    assert found["without AdamW"].startswith("+ our AdamW") and found["without linear"] == "+ linear"
    assert found.get("without bf16", "") == ("+ bf16 autocast, fused AdamW" if precision == "bf16" else "")
    assert len(set(found.values())) == len(removals)
    with pytest.raises(UserError, match=r"'without wings' is no part of a line"):
        table_kinds.line_of("wings", lines)


def test_loader_and_dataloader_give_the_same_batches(tiny: Place) -> None:
    mine = gpt_ladder.ours(tiny.shards, 2, 16, CPU)
    others = gpt_ladder.theirs(tiny.shards, 2, 16, CPU)
    for _ in range(3):
        for a, b in zip(next(mine), next(others), strict=True):
            assert torch.equal(a, b)


def test_masters_keep_what_bf16_rounds_away() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW(
        [{"params": [weight], "weight_decay": 0.0}], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=1.0
    )
    optimizer.set_master(weight, torch.full((4,), 1.001))
    for _ in range(30):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Each step is a fiftieth of what bf16 resolves at 1.
    assert weight.tolist() == pytest.approx([1.001 - 30e-4] * 4, abs=4e-3) and weight[0] != 1


def test_the_profile_counts_the_events_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the profiler has the range of a step once more, as an event of that device."""

    def event(name: str, start: int, end: int, kind: DeviceType) -> FunctionEvent:
        return FunctionEvent(
            id=start, name=name, thread=1, start_us=start, end_us=end, device_type=kind, stack=[],
            use_device="cuda", is_user_annotation=name == train.STEP,
        )  # fmt: skip

    made = EventList(
        [
            event(train.STEP, 0, 1000, DeviceType.CPU), event("aten::mm", 10, 900, DeviceType.CPU),
            event(train.STEP, 50, 1900, DeviceType.CUDA), event("gemm_kernel", 60, 800, DeviceType.CUDA),
        ],
        use_device="cuda",
    )  # fmt: skip
    made._build_tree()
    monkeypatch.setattr(torch.profiler, "profile", lambda: contextlib.nullcontext(made))
    found = train.profile(lambda: None, CPU, steps=1)  # type: ignore[arg-type]
    assert found.step_ms == 1.0 and found.ops == [("aten::mm", 1.0, 0.89)]


def test_the_profile_accounts_for_the_step() -> None:
    step = train.Step("demo", "plain", 2, CPU, sizes={**TINY, "n_embd": 64, "block_size": 64})
    found = train.profile(step, CPU)
    assert found.ops[0][2] >= found.ops[-1][2] and 0.2 < found.accounted() <= 1.0


@pytest.mark.slow
def test_peak_memory_is_that_of_the_step() -> None:
    """In a process of its own: each of 8 million parameters more costs 16 bytes (weight, gradient and two
    moments), and at most as much again while PyTorch's AdamW works."""
    sizes = [{**TINY, "vocab_size": vocabulary} for vocabulary in (320, 320 + 125_000)]
    rungs = [
        Rung(name, partial(train.Step, "demo", "plain", 1, CPU, sizes=each), elsewhere=name == "large")
        for name, each in zip(("small", "large"), sizes, strict=True)
    ]
    small, large = ladder.peaks(Ladder("sizes", rungs), CPU)
    assert 1 <= (large - small) / (125_000 * 2 * 32 * 16) <= 2

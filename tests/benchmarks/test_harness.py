"""Interleaved rounds, ratios, ceilings, and what the command line refuses."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from benchmarks import harness, sweeps
from benchmarks.__main__ import main
from benchmarks.ceilings import Ceilings, Probe
from benchmarks.commands.everything import try_llama_ladder
from benchmarks.harness import Case, WrongResult, close
from benchmarks.ops import nf4
from gpt.cli import UserError

CPU = torch.device("cpu")


def case(variants: dict, work: float = 1.0) -> Case:
    return Case("op", "1x1", torch.float32, variants, "gemm", work, close(1e-3, 1e-3))


def test_ratios_are_those_of_the_times(clock) -> None:
    one = [torch.ones(2)]
    rows = harness.measure(case({"peer": clock.taking(0.3, one), "ours": clock.taking(0.1, one)}), CPU, 5)
    assert [row.ratio_vs["peer"] for row in rows] == pytest.approx([1.0, 3.0], rel=1e-3)
    assert rows[1].median_ms == pytest.approx(100, rel=1e-3)
    assert rows[1].extra["ratio_error"] < 1e-3


def test_noisy_ratios_take_more_rounds(clock) -> None:
    one, turn = [torch.ones(2)], iter(range(1000))

    def noisy() -> object:
        clock.now += 3e-3 * (1 + next(turn) % 3)
        return one

    counts = {}
    for name, run in {"steady": clock.taking(3e-3, one), "noisy": noisy}.items():
        calls: list[float] = []

        def peer(calls: list[float] = calls) -> object:
            calls.append(clock.now)
            clock.now += 3e-3
            return one

        harness.measure(case({"peer": peer, name: run}), CPU, 5)
        counts[name] = len(calls) - 2
    assert counts == {"steady": 5, "noisy": 5 * harness.MOST_TIMES_ROUNDS}
    slow = [1.0, 2.0, 1.0, 2.0, 1.0]
    assert harness._settled({"peer": slow, "ours": slow[::-1]}, "peer")  # whose time is up


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, harness.ROUNDS), (10.0, 4), (100.0, 3)])
def test_rounds_fill_the_time_for_them(clock, seconds, rounds) -> None:
    ceilings = Ceilings(CPU, [torch.float32], ["gemm"])
    found = harness.interleave({"a": clock.taking(seconds)}, ceilings, None)
    assert found["a"] == pytest.approx([seconds] * rounds, rel=1e-3)
    assert len(harness.interleave({"a": clock.taking(seconds)}, ceilings, 5)["a"]) == 5
    parts = [harness.interleave({"a": clock.taking(seconds)}, ceilings, None, parts=3)["a"] for _ in "abc"]
    assert [len(part) for part in parts] == [{9: 3, 4: 2, 3: 1}[rounds]] * 3


def test_errors_of_few_ratios_are_not_too_small() -> None:
    """Of medians of normal values: what is told is, at the median, about what they scatter by."""
    values = torch.randn(2000, 7, generator=torch.Generator().manual_seed(0)) * 0.02 + 1
    for count in (3, 5, 7):
        few = values[:, :count]
        told = torch.tensor([harness.relative_error(row) for row in few.tolist()]).median()
        assert 0.82 < told / few.median(1).values.std() < 1.15, count
    assert harness.relative_error([1.0, 1.0]) == 0.1


def test_shared_ceilings_are_those_around_the_case(clock) -> None:
    """Those of its rounds, and the last one that was timed before it."""
    ceilings = Ceilings(CPU, [torch.float32], ["gemm"])
    for _ in range(4):
        ceilings.round()
    probes = ceilings.probes["gemm torch.float32"]
    last = [probe.seconds[-1] for probe in probes]
    harness.take(case({"peer": clock.taking(0.1, [])}), 3, ceilings, lambda: {"peer": 1})
    assert [(probe.seconds[0], len(probe.seconds)) for probe in probes] == [(first, 4) for first in last]


def test_one_round_a_sweep_is_all_of_what_is_slow(clock) -> None:
    """What is quick takes as many as it needs, and is warmed up once in every sweep."""
    called = dict.fromkeys(("slow", "quick"), 0)

    def variant(name: str, seconds: float, *, noise: float = 0.0) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            called[name] += 1
            clock.now += seconds * (1 + noise * (called[name] % 3))
            return []

        return run

    def build(name: str, seconds: float) -> Case:
        return case({"peer": clock.taking(seconds, []), "ours": variant(name, seconds, noise=0.5)})

    measured = sweeps.Sweeps([lambda: build("slow", 2.0), lambda: build("quick", 0.005)], CPU, 3)
    measured.sweep_all()
    rounds = 2 * harness.MOST_TIMES_ROUNDS
    assert called == {"slow": 1 + 3 * (1 + 1), "quick": 1 + 3 * (1 + rounds)}  # results are compared once


def test_rounds_are_spread_over_sweeps(clock) -> None:
    """A case that has become slower minutes later: its ratio is the middle one, and its error tells."""
    pace, built = {"ours": 0.1}, []

    def ours() -> list[torch.Tensor]:
        clock.now += pace["ours"]
        return []

    def build(name: str) -> Case:
        built.append(name)
        return replace(case({"peer": clock.taking(0.3, []), "ours": ours}), subject=name)

    measured = sweeps.Sweeps([lambda: build("a"), lambda: build("b")], CPU, 5)
    for pace["ours"] in (0.1, 0.15, 0.3):
        measured.sweep()
    measured.sweep()  # is over
    assert built == ["a", "b"] * sweeps.SWEEPS
    rows = measured.rows()
    assert [(row.subject, row.variant) for row in rows] == [
        (subject, variant) for subject in "ab" for variant in ("peer", "ours")
    ]
    assert rows[1].ratio_vs["peer"] == pytest.approx(2.0, rel=1e-3)
    assert rows[1].extra["ratio_error"] == pytest.approx(sweeps.error_of_median([3.0, 2.0, 1.0]), rel=1e-3)
    assert rows[1].extra["sweeps"] == 3
    assert sweeps.Sweeps([], CPU, 1).count == 1 and sweeps.Sweeps([], CPU, 5).rows() == []


def test_a_disturbed_sweep_counts_once(clock) -> None:
    """It takes six times the rounds of a quiet one, as its ratios do not settle."""
    noise, turn = {"now": 0.0}, iter(range(1000))

    def ours() -> list[torch.Tensor]:
        clock.now += 1e-3 * (1 + noise["now"] * (2 + next(turn) % 3))
        return []

    measured = sweeps.Sweeps([lambda: case({"peer": clock.taking(3e-3, []), "ours": ours})], CPU, 9)
    for noise["now"] in (0.0, 1.0, 0.0):
        measured.sweep()
    ours_row = measured.rows()[1]
    assert ours_row.ratio_vs["peer"] == pytest.approx(3.0, rel=1e-3)
    assert ours_row.median_ms == pytest.approx(1.0, rel=1e-3)
    assert ours_row.extra["ratio_error"] > 0.3


def test_errors_of_sweeps_are_not_too_small() -> None:
    """Of medians of three normal values, four errors are almost always enough."""
    values = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * 0.02 + 1
    off = [abs(row.median() - 1) > 4 * sweeps.error_of_median(row.tolist()) * row.median() for row in values]
    assert sum(off) < 0.06 * len(off)
    assert sweeps.error_of_median([2.0]) == 0.0


def test_orders_are_balanced() -> None:
    """What runs first sees other caches: each of two variants does in half of the rounds."""
    calls: list[str] = []
    variants = {name: partial(calls.append, name) for name in "ab"}
    harness.interleave(variants, Ceilings(CPU, []), 6, limits=False)
    assert sorted(calls[::2]) == ["a"] * 3 + ["b"] * 3
    several = set()
    for seed in range(8):
        calls.clear()
        harness.interleave(
            variants, Ceilings(CPU, []), 1, limits=False, generator=harness.random.Random(seed)
        )
        several.add(calls[0])
    assert several == {"a", "b"}


def test_a_wrong_result_is_not_timed(clock) -> None:
    wrong = clock.taking(0.1, [torch.zeros(2)])
    with pytest.raises(WrongResult, match=r"op 1x1, ours: .*result 0 is wrong"):
        harness.measure(case({"peer": clock.taking(0.1, [torch.ones(2)]), "ours": wrong}), CPU, 5)


def broken() -> object:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")


def test_a_peer_that_does_not_run_is_left_out_with_its_reason(clock, capsys) -> None:
    """Ours fails the run, but at its end; a case without its baseline has nothing to be compared with."""
    one = [torch.ones(2)]
    good, told = partial(clock.taking, 0.1, one), "OutOfMemoryError: CUDA out of memory."
    variants = (
        {"torch": good(), "peer": broken, "tapelm": good()},
        {"torch": good(), "tapelm": broken},
        {"torch": broken, "tapelm": good()},
        {"torch": good(), "tapelm": good()},
    )
    builds = [partial(case, dict(each)) for each in variants]
    swept = sweeps.Sweeps(builds, CPU, 6)
    swept.sweep_all()
    assert [row.variant for row in swept.rows()] == ["torch", "tapelm", "torch", "torch", "tapelm"]
    assert [(each["variant"], each["error"]) for each in swept.errors] == [
        ("peer", told), ("tapelm", told), ("torch", told)
    ]  # fmt: skip
    assert swept.failed() == [f"op 1x1, tapelm: {told}"]
    assert capsys.readouterr().out.count(told) == 3
    with pytest.raises(WrongResult, match="out of memory"):
        sweeps.measure_all(builds, CPU, 3)
    assert [row.variant for row in harness.measure(builds[0](), CPU, 3)] == ["torch", "tapelm"]
    assert harness.measure(builds[2](), CPU, 3) == [] and capsys.readouterr().out.count("skipped:") == 2
    with pytest.raises(WrongResult, match="out of memory"):
        harness.measure(builds[1](), CPU, 3)


def test_ops_writes_rows_after_each_sweep_and_fails_at_the_end(clock, monkeypatch, tmp_path, capsys) -> None:
    one, path = [torch.ones(2)], tmp_path / "ops.json"
    seen = []

    def builds(*arguments: object, **options: object) -> list:
        def build() -> Case:
            seen.append(json.loads(path.read_text()) if path.exists() else None)
            return case({"torch": clock.taking(0.1, one), "tapelm": clock.taking(0.1, one)})

        return [build, partial(case, {"torch": clock.taking(0.1, one), "tapelm": broken})]

    monkeypatch.setattr("benchmarks.commands.timed.cases_of", builds)
    assert main(["ops", "--json", str(path), "--device", "cpu", "--rounds", "3"]) == 1
    assert seen[0] is None and [len(each["rows"]) for each in seen[1:]] == [3, 3]
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 3 and content["errors"][0]["variant"] == "tapelm"
    assert "FAILED: op 1x1, tapelm: OutOfMemoryError" in capsys.readouterr().out


def test_codes_of_a_gpu_may_be_their_neighbours_and_seldom() -> None:
    agree = nf4.equal_bytes(torch.device("cuda"))
    expected = torch.full((1, 4096, 1), 0x57, dtype=torch.uint8)
    tried = (0x67, 1, True), (0x56, 4, True), (0x77, 1, False), (0x59, 1, False), (0x67, 9, False)
    for byte, count, fine in tried:
        ours = expected.clone()
        ours[0, :count] = byte
        if fine:
            agree(ours, expected)
            with pytest.raises(AssertionError):
                nf4.equal_bytes(CPU)(ours, expected)
        else:
            with pytest.raises(AssertionError):
                agree(ours, expected)


def test_the_ceiling_is_the_best_shape_and_named(clock) -> None:
    ceilings = Ceilings(CPU, [torch.float32, torch.float32])
    ceilings.round()
    for probe, seconds in zip(ceilings.probes["gemm torch.float32"], (1.0, 1.0, 0.5, 0.25), strict=True):
        probe.seconds[:] = [seconds] * 3
    limit = ceilings.gemm(torch.float32)
    assert limit.rate == 2 * 4 * 8 * 16 / 0.25
    assert limit.label.endswith("GFLOP/s GEMM 4x8x16 (ours)")
    assert set(ceilings.as_json()["copy"]) == {"copy", "copy (ours)", "triad"}


def test_what_cannot_be_the_ceiling_is_not_timed_again(clock) -> None:
    taking = {"best": 1.0, "near": 2.0, "hopeless": 3.0}
    probes = [Probe(name, clock.taking(seconds), 1.0, []) for name, seconds in taking.items()]
    kept = Ceilings(CPU, [])._contenders(probes)
    assert [probe.name for probe in kept] == ["best", "near"]


def test_captured_operands_live_as_long_as_their_graph(monkeypatch) -> None:
    """A graph replays on the addresses that its tensors had, and holds no tensor itself."""
    made: list[weakref.ref[torch.Tensor]] = []

    def making(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*size: int, device: object = None, **options: object) -> torch.Tensor:
            tensor = factory(*size, **options)
            made.append(weakref.ref(tensor))
            return tensor

        return make

    for name in ("zeros", "randn", "empty"):
        monkeypatch.setattr(torch, name, making(getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 10)
    monkeypatch.setattr("benchmarks.ceilings.CUDA_GEMM_SHAPES", ((8, 8, 8),))
    monkeypatch.setattr("benchmarks.ceilings.timed", lambda *a: 1.0)
    ceilings = Ceilings(cast(torch.device, SimpleNamespace(type="cuda")), [torch.float32])
    gc.collect()
    assert [len(probes) for probes in ceilings.probes.values()] == [1, 2]
    assert len(made) == 6 and all(each() is not None for each in made)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_products_are_left_out_where_hardware_has_none(clock, monkeypatch, capsys, native) -> None:
    monkeypatch.setattr(harness, "native_bf16", lambda device: native)
    made = [
        replace(case({"peer": clock.taking(0.1, [])}), dtype=torch.bfloat16, bound=b)
        for b in ("gemm", "copy")
    ]
    rows = sweeps.measure_all([lambda: made[0], lambda: made[1]], CPU, 3)
    assert len(rows) == 1 + native
    assert ("skipped: 1 cases of matrix products in bfloat16" in capsys.readouterr().out) is not native


def test_more_than_the_ceiling_is_flagged(clock, capsys) -> None:
    fast = case({"peer": clock.taking(1e-9, []), "ours": clock.taking(1.0, [])}, work=1e12)
    rows = harness.measure(fast, CPU, 3)
    assert [row.variant for row in harness.impossible(rows)] == ["peer", "ours"]
    harness.report("title", rows, CPU)
    assert "of its ceiling" in capsys.readouterr().out


def test_results_name_machine_and_command(clock, tmp_path: Path) -> None:
    rows = harness.measure(case({"peer": clock.taking(0.1, [])}), CPU, 3)
    harness.write_results(tmp_path / "new" / "a.json", CPU, rows, more={"x": 1})
    content = json.loads((tmp_path / "new" / "a.json").read_text())
    assert content["more"] == {"x": 1} and content["rows"][0]["subject"] == "op"
    assert {"device", "threads", "cpu_model", "bf16", "commit", "command", "date"} <= set(content["machine"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["static", "--json", "x.json"], "Unrecognized options: --json"),
        (["ops", "--profile"], "--profile; for all options: python -m benchmarks ops --help"),
        (["train", "--profile", "--json", "x.json"], "leave out --json"),
        (["ops", "--check", "--json", "x.json"], "leave out --json"),
        (["ops", "a.json"], "Unrecognized options: a.json"),
        (["all", "--text", "no/such.txt"], "--text: there is no no/such.txt"),
        (["ladder", "--model", "bert"], "bert"),
        (["ladder", "--out", "x"], "--out means nothing to the ladder of gpt"),
        (["ladder", "--model", "llama", "--rounds", "3"], "--rounds means nothing to the ladder of llama"),
        (["train", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["all", "--out", "x", "--json", "x.json"], "leave out --json"),
        (["all", "--out", "x", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["all", "--out", "x", "--only", "nope"], "no op is called 'nope'"),
        (["train", "--json", "new/x.json", "--threads", "-1"], "-1"),
        (["--rounds", "3", "ops"], "the subject comes before its options"),
        (["ops", "--only", "dropout", "--json", "/proc/x.json"], "cannot write /proc/x.json"),
        (["plan", "a.json"], "there is no a.json: write it with python -m benchmarks scaling --json a.json"),
        (["models", "run", "--out", "/dev/null"], "cannot write /dev/null/models.md"),
        (["opss"], "Available subcommands: ops, train"),
        ([], "Expected one of {ops, train"),
        (["scaling", "--preset", "gpt2"], "Unrecognized options: --preset"),
        (["plan", "a.json", "b.json"], "Unrecognized options: b.json"),
        (["compare", "a.json"], "Missing from python -m benchmarks compare: PATH now"),
    ],
)
def test_what_would_be_ignored_is_refused(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(arguments)
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_all_goes_on_without_the_llama_ladder_but_not_if_it_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: UserError) -> None:
        def add(measurement: object) -> None:
            raise error

        try_llama_ladder(Path("base"), CPU, None, add)

    monkeypatch.setattr("benchmarks.commands.everything.fetched", lambda base: base)
    monkeypatch.setattr("benchmarks.ladder_report.Measurement", lambda *arguments: None)
    failing(UserError("no base"))
    assert "skipped: ladder of llama: no base" in capsys.readouterr().out
    with pytest.raises(WrongResult):
        failing(WrongResult("another loss"))

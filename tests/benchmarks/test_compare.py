"""Ratios against committed ones: what noise allows, what it does not, and a kernel that is sabotaged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tapelm
from benchmarks import compare
from benchmarks.compare import LEAST, MOST, RESULTS, changes, committed
from benchmarks.harness import Case, Row, close, write_results
from benchmarks.ops import bias_gelu
from gpt.cli import UserError
from gpt.hardware import fingerprint

CPU = torch.device("cpu")


def row(ratio: float, error: float = 0.001, variant: str = "tapelm") -> Row:
    return Row(
        "op",
        variant,
        "1x1",
        "float32",
        "cpu",
        1.0,
        1.0,
        1.0,
        {"torch": ratio},
        "",
        0.5,
        {"ratio_error": error},
    )


@pytest.mark.parametrize(
    ("before", "now", "error", "slower"),
    [
        (2.0, 1.85, 0.001, False),  # less than a tenth
        (2.0, 1.75, 0.001, True),
        (2.0, 1.75, 0.05, False),  # four errors of each
        (2.0, 0.9, 0.9, True),  # no noise excuses half
        (2.0, 4.0, 0.001, False),
    ],
)
def test_a_fall_counts_when_it_exceeds_the_noise(before, now, error, slower) -> None:
    (change,) = changes([row(before, error)], [row(now, error)])
    assert change.slower is slower and LEAST <= change.allowed <= MOST


def test_baselines_and_unknown_rows_are_not_compared() -> None:
    assert changes([row(1.0, variant="torch")], [row(0.5, variant="torch")]) == []
    assert changes([row(1.0)], [row(0.5, variant="tapelm 8-bit")]) == []


def results(path: Path, rows: list[Row], **machine: Any) -> Path:
    write_results(path, CPU, rows)
    content = json.loads(path.read_text())
    content["machine"] |= machine
    path.write_text(json.dumps(content))
    return path


def test_compare_tells_faster_from_slower_by_its_status(tmp_path: Path, capsys) -> None:
    a, b = results(tmp_path / "a.json", [row(2.0)]), results(tmp_path / "b.json", [row(1.0)])
    assert compare.run(a, b) == 1 and "SLOWER" in capsys.readouterr().out
    assert compare.run(b, a) == 0 and "faster" in capsys.readouterr().out


@pytest.mark.parametrize("machine", [{"cpu_model": "other"}, {"threads": 64}, {"cpu_capability": "AVX9"}])
def test_other_machines_are_refused(tmp_path: Path, machine: dict[str, Any]) -> None:
    a, b = results(tmp_path / "a.json", [row(2.0)]), results(tmp_path / "b.json", [row(2.0)], **machine)
    with pytest.raises(UserError, match=f"different machines: {next(iter(machine))}"):
        compare.run(a, b)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"machine": {}, "rows": [{"a": 1}]}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is not a result"):
        compare.read(tmp_path / "a.json")


def test_committed_rows_are_those_of_this_kind_of_machine(tmp_path: Path) -> None:
    machine = fingerprint(CPU)
    results(tmp_path / "old.json", [row(3.0)], date="2020-01-01")
    results(tmp_path / "new.json", [row(2.0)], date="2021-01-01")
    results(tmp_path / "else.json", [row(9.0)], cpu_capability="AVX9", date="2022-01-01")
    (tmp_path / "static.lock.json").write_text("{}")
    (tmp_path / "llama.json").write_text(json.dumps({"machine": machine, "rows": [{"name": "x"}]}))
    rows, least = committed(machine, tmp_path)
    assert [each.ratio_vs["torch"] for each in rows] == [2.0] and least == LEAST
    results(tmp_path / "old.json", [row(3.0)], cpu_model="x")
    results(tmp_path / "new.json", [row(2.0)], cpu_model="y")
    assert committed(machine, tmp_path)[1] > LEAST
    with pytest.raises(UserError, match="no results of a machine like this one"):
        committed({**machine, "threads": 999}, tmp_path)


def test_what_is_committed_can_be_read() -> None:
    """Among them results of other programs, which have rows of their own or none."""
    machine = json.loads((RESULTS / "amd-epyc-zen5-2cores-all-2026-11-30.json").read_text())["machine"]
    assert len(committed(machine)[0]) > 100


def synthetic(clock, seconds: float, value: float = 1.0) -> Case:
    variants = {
        "torch": clock.taking(2.0, [torch.ones(1)]),
        "tapelm": clock.taking(seconds, [torch.full((1,), value)]),
    }
    return Case("op", "1x1", torch.float32, variants, "gemm", 1.0, close(1e-3, 1e-3))


@pytest.mark.parametrize(
    ("seconds", "value", "status", "told"),
    [
        (1.0, 1.0, 0, "0 cases wrong"),
        (1.5, 1.0, 1, "1 ratios slower"),
        (0.1, 1.1, 1, "WRONG: op 1x1, tapelm"),
    ],
)
def test_check_finds_slow_and_wrong_kernels(clock, capsys, seconds, value, status, told) -> None:
    found = compare.check([lambda: synthetic(clock, seconds, value)], CPU, 3, ([row(2.0)], LEAST))
    assert found == status and told in capsys.readouterr().out


def test_one_disturbance_is_no_finding(clock) -> None:
    calls = iter(range(100))
    assert compare.check([lambda: _disturbed(clock, calls)], CPU, 1, ([row(2.0)], LEAST)) == 0
    assert next(calls) > 4  # taken again


def test_variants_that_move_on_are_compared_from_the_start_in_every_attempt(clock, capsys) -> None:
    """As optimizers, which are called unequally often in rounds."""

    def build() -> Case:
        case, total = synthetic(clock, 1.5), torch.zeros(1)
        case.variants["tapelm"] = lambda: [(clock.taking(1.5)(), total.add_(1))[1].clone()]
        return case

    assert compare.check([build], CPU, 3, ([row(2.0)], LEAST)) == 1
    assert "0 cases wrong, 1 ratios slower" in capsys.readouterr().out


def _disturbed(clock, calls: Iterator[int]) -> Case:
    case = synthetic(clock, 1.0)
    slow = clock.taking(5.0, [torch.ones(1)])
    fine = case.variants["tapelm"]
    # Call 0 is the comparison, 1 the first timing, which something else disturbs.
    case.variants["tapelm"] = lambda: slow() if next(calls) == 1 else fine()
    return case


def test_nothing_committed_is_an_error_not_a_pass(clock) -> None:
    with pytest.raises(UserError, match="nothing measured here is committed"):
        compare.check([lambda: synthetic(clock, 1.0)], CPU, 1, ([], LEAST))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], Callable[[], Case]]:
    """A real case of bias_gelu whose kernel is replaced by a function of the real one."""
    real = tapelm.bias_gelu

    def build(sabotage: Callable[..., Any]) -> Callable[[], Case]:
        monkeypatch.setattr(tapelm, "bias_gelu", lambda x, bias: sabotage(real(x, bias)))
        return lambda: bias_gelu.case(CPU, (64, 64), torch.float32)

    return build


def slowed(out: torch.Tensor) -> torch.Tensor:
    time.sleep(0.02)
    return out


def test_a_real_kernel_with_a_sleep_or_an_error_is_caught(kernel, monkeypatch, capsys) -> None:
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 16)
    known = compare.measure(kernel(lambda out: out)(), CPU, 3)
    assert compare.check([kernel(slowed)], CPU, 3, (known, LEAST)) == 1
    assert "1 ratios slower" in capsys.readouterr().out
    assert compare.check([kernel(lambda out: 1.05 * out)], CPU, 3, (known, LEAST)) == 1
    assert "WRONG: bias_gelu fwd+bwd 64x64, tapelm" in capsys.readouterr().out

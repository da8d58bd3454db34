"""Compilation ahead of time; in processes of its own, as interpreted kernels cannot be compiled."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

from benchmarks import static
from tapelm._attention_configs import DECODE_WARPS
from tapelm.proofs import resources

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "benchmarks/results/static.lock.json"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def test_the_lock_is_of_what_ships_and_keeps_the_rules() -> None:
    """Every launch has a row made from its present source, and no row breaks a rule.

    Keys hold the version of Triton too, which here is that of the lock, whichever is installed.
    """
    script = """
import json, triton
from benchmarks import static
triton.__version__ = json.loads(static.LOCK.read_text())["triton"]
locked = static._read()
wanted = {static.name_of(row): row for unit in static.units() for row in [static.identity(unit)]}
print([name for name in wanted.keys() ^ locked.keys()])
print([name for name, row in wanted.items() if name in locked and locked[name]["key"] != row["key"]])
print([(name, rules) for name, row in locked.items() if (rules := static.broken_rules(row))])
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["[]", "[]", "[]"]


def test_the_lock_names_every_target() -> None:
    rows = json.loads(LOCK.read_text(encoding="utf-8"))["rows"]
    by_target = {row["target"]: 0 for row in rows}
    for row in rows:
        by_target[row["target"]] += 1
    assert set(by_target) == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert min(by_target.values()) > 70
    assert any("50257" in row["shape"] for row in rows)


def test_a_multiprocessor_holds_the_programs_that_decoding_counts_on() -> None:
    """By registers and shared memory: its keys are cut for so many at once."""
    rows = json.loads(LOCK.read_text(encoding="utf-8"))["rows"]
    warps = {
        static.name_of(row): row["occupancy"] * resources.TARGETS[row["target"]].warps
        for row in rows
        if row["kernel"] == "attention_decode_kernel"
    }
    assert len(warps) > 80 and min(warps.values()) >= DECODE_WARPS, warps


FAULTS = """
import torch
from benchmarks import static
from benchmarks.subjects import SUBJECTS, meta
from tapelm import _attention_configs
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.proofs.launches import captured_launches
from tapelm.proofs.resources import TARGETS, compile_resources
from dataclasses import asdict

subject = next(subject for subject in SUBJECTS if subject.launcher == "attention_forward")
for config in ((128, 128, 4, 3), (128, 128, 8, 5)):
    _attention_configs.BY_ARCHITECTURE["sm_80", "forward"] = {(2, 128, False): config}
    with assumed_architecture("sm_80"), captured_launches() as launches:
        CUDA_LAUNCHERS[subject.launcher](*subject.arguments(meta(torch.bfloat16), 1, 4, 4, 1024, 128))
    facts = asdict(compile_resources(launches[0].specialize(TARGETS["sm_80"].gpu), TARGETS["sm_80"]))
    row = {"kernel": launches[0].name, "shape": "1024", "dtype": "bfloat16", "target": "sm_80", **facts}
    print(static.broken_rules(row))
"""


def test_faults_block_size_that_spills_and_shared_memory_that_does_not_fit() -> None:
    done = run("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    spilling, sharing = done.stdout.splitlines()[-2:]
    assert "spills" in spilling and "shared memory" in sharing


def test_programs_start_at_fixed_addresses_within_it_alone() -> None:
    """Where the system refuses it, as Docker does, it says so."""

    def addresses() -> str:
        return subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True, check=True).stdout

    with resources.fixed_addresses() as fixed:
        assert (addresses() == addresses()) == fixed
    assert addresses() != addresses()


TWO_FILES = """
%0 = tt.load %a : tensor<64x!tt.ptr<f32>> loc(#loc1)
%1 = tt.load %b : tensor<64x!tt.ptr<f32>> loc(#loc3)
#loc1 = loc("/x/one.py":7:4)
#loc2 = loc("/x/two.py":{line}:4)
#loc3 = loc(callsite(#loc2 at #loc1))
"""
ASSEMBLY = {
    "ptx": """
	.loc	1 7 4
	ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
	.loc	2 {line} 4
	ld.global.b32 %r5, [%rd2];
	.file	1 "/x/one.py"
	.file	2 "/x/two.py"
""",
    "amdgcn": """
	.file	1 "/x" "one.py"
	.loc	1 7 4 prologue_end ; one.py:7:4
	global_load_dwordx4 v[0:3], v1, s[0:1]
	.file	2 "/x" "two.py"
	.loc	2 {line} 4 ; two.py:{line}:4
	global_load_dword v4, v1, s[2:3]
""",
}


@pytest.mark.parametrize("kind", ASSEMBLY)
def test_lines_of_two_files_are_not_one(kind: str) -> None:
    """Half of the bytes are loaded wide, whether or not the other load is on the same line of its file."""
    for line in (7, 8):
        share = resources._wide_share(TWO_FILES.format(line=line), ASSEMBLY[kind].format(line=line))
        assert share == 0.5


@pytest.mark.parametrize(
    ("registers", "changes"), [([188, 188, 191], []), ([188] * static.TRIES, ["registers was 191, is 188"])]
)
def test_a_row_that_differs_by_chance_is_compiled_again(
    registers: list[int], changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random addresses, which may give what fixed ones do not behind other paths."""
    given: list[bool] = []

    def facts(unit: static.Unit, *, fixed: bool = True) -> dict[str, int]:
        given.append(fixed)
        return {"registers": registers[len(given) - 1]}

    monkeypatch.setattr(static, "facts", facts)
    unit = static.Unit(0, 0, 0, "sm_90")
    assert static._difference((unit, float("inf"), {"registers": 191})) == changes
    assert given == [True] + [False] * (len(registers) - 1)
    assert static._difference((unit, 0.0, {})) is None


def test_a_lock_is_not_written_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refused() -> Iterator[bool]:
        yield False

    monkeypatch.setattr(static.knobs.runtime, "interpret", False)
    monkeypatch.setattr(static, "fixed_addresses", refused)
    monkeypatch.setattr(static, "update", lambda seconds: pytest.fail("wrote the lock"))
    with pytest.raises(static.UserError, match="random addresses"):
        static.run(check_only=False, seconds=1.0)


def test_capturing_needs_a_compiler() -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "static", "--check"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr + done.stdout


@pytest.mark.slow
def test_check_passes() -> None:
    done = run("-m", "benchmarks", "static", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


TUTORIAL = """
import torch

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else 1 / 0)


@triton.jit
def _inner(x, BLOCK: tl.constexpr):
    return x * BLOCK


@triton.autotune([], key=[])
@triton.jit
def _attn_fwd({arguments}, BLOCK_M: tl.constexpr):
    at = M + tl.arange(0, 64 * BLOCK_M)
    tl.store(at, _inner(tl.load(at), BLOCK_M))


@triton.jit
def _attn_bwd(Q, DQ, H, HEAD_DIM: tl.constexpr):
    at = tl.arange(0, HEAD_DIM)
    tl.store(DQ + at, tl.load(Q + at))
"""

COMPARE = """
import sys
from benchmarks import static_peers
static_peers.PAIRS, static_peers.WIDTHS = (), (64,)
static_peers.TARGETS = {"sm_80": static_peers.TARGETS["sm_80"]}
from benchmarks.__main__ import main, run_program
for path in sys.argv[1:]:
    sys.argv = ["benchmarks", "static", "--peers", "--tutorial", path]
    try:
        run_program(main)
    except SystemExit as end:
        print("status", end.code, file=sys.stderr, flush=True)
"""


def test_the_tutorials_kernels_are_compiled_beside_ours(tmp_path: Path) -> None:
    path = tmp_path / "06-fused-attention.py"
    path.write_text(TUTORIAL.replace("{arguments}", "M"))
    done = run("-c", COMPARE, str(path))
    assert done.stderr.endswith("status 0\n"), done.stdout + done.stderr
    assert "triton _attn_fwd" in done.stdout and "tapelm attention_backward_keys_kernel" in done.stdout
    assert "spills, ours: 0 of 2" in done.stdout
    assert "more registers for no larger a tile, ours: 1 of 2\n  attention forward 64 sm_80: " in done.stdout


NOT_THE_TUTORIAL = (
    (None, "is not a file"),
    ("x = 1\n", "has no _attn_bwd and no _attn_fwd"),
    (TUTORIAL.replace("{arguments}", "M, novelty"), "_attn_fwd wants novelty"),
    ("def f(:\n", "is not the tutorial: invalid syntax"),
)


def test_another_file_is_not_taken_for_the_tutorial(tmp_path: Path) -> None:
    paths = [tmp_path / f"tutorial{number}.py" for number in range(len(NOT_THE_TUTORIAL))]
    for path, (text, _) in zip(paths, NOT_THE_TUTORIAL, strict=True):
        if text is not None:
            path.write_text(text)
    done = run("-c", COMPARE, *map(str, paths))
    told = done.stderr.split("status 2\n")
    assert len(told) == len(paths) + 1 and told[-1] == "", done.stdout + done.stderr
    for said, (_, complaint) in zip(told, NOT_THE_TUTORIAL, strict=False):
        assert complaint in said


@pytest.mark.parametrize("options", [["--peers", "--check"], ["--tutorial", "x.py"]])
def test_options_that_would_be_ignored_are_refused(options: list[str]) -> None:
    done = run("-m", "benchmarks", "static", *options)
    assert done.returncode == 2 and "--peers" in done.stderr + done.stdout

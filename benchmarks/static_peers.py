"""Other libraries' Triton kernels compiled as ours are, side by side: python -m benchmarks static --peers.

Liger's layer norm and cross-entropy and bitsandbytes' NF4 dequantization, where installed
(`pip install -e ".[peers]"`), and the attention of Triton's tutorial, given its file. They are not in the
lock file, whose rows must not depend on what else is installed. The launchers get small or meta tensors:
widths, dtypes and alignment decide the code.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import static_tutorial
from benchmarks.subjects import BF16, meta, random
from tapelm._library import CUDA_LAUNCHERS, assumed_architecture
from tapelm.proofs.launches import captured_launches
from tapelm.proofs.resources import TARGETS, Target, compile_resources

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Pair:
    """One task: our launch, and a peer's that needs `package`."""

    task: str
    package: str
    theirs: Launch
    ours: Launch


def _liger_norm(cols: int) -> Launch:
    def launch() -> None:
        ops = importlib.import_module("liger_kernel.ops.layer_norm")
        make = random(BF16)
        x, weight, bias = make((8, cols)), make((cols,)), make((cols,))
        y, x, mean, rstd, *_ = ops.layer_norm_forward(x, weight, bias, 1e-5)
        ops.layer_norm_backward(y, x, weight, bias, mean, rstd)

    return launch


def _our_norm(cols: int) -> Launch:
    def launch() -> None:
        make = random(BF16)
        x, weight = make((8, cols)), make((cols,))
        y, mean, rstd = CUDA_LAUNCHERS["layer_norm_forward"](x, weight, weight, 1e-5)
        CUDA_LAUNCHERS["layer_norm_backward"](y, x, weight, mean, rstd)

    return launch


def _liger_cross_entropy(vocabulary: int) -> Launch:
    def launch() -> None:
        ops = importlib.import_module("liger_kernel.ops.cross_entropy")
        logits = torch.zeros(8, vocabulary, dtype=BF16, requires_grad=True)
        ops.cross_entropy_forward(
            logits, torch.zeros(8, dtype=torch.int64), None, -100, 0.0, 0.0, "mean", None, False
        )

    return launch


def _our_cross_entropy(vocabulary: int) -> Launch:
    def launch() -> None:
        make = random(BF16)
        targets = torch.zeros(8, dtype=torch.int64)
        CUDA_LAUNCHERS["linear_cross_entropy_forward"](
            make((8, 16)), make((vocabulary, 16)), targets, None, -100, True
        )

    return launch


def _bitsandbytes() -> None:
    ops = importlib.import_module("bitsandbytes.backends.triton.kernels_4bit")
    packed, scales = torch.zeros(4096, 1, dtype=torch.uint8), torch.zeros(128)
    ops.dequantize_4bit_impl(packed, scales, 64, "nf4", BF16, torch.zeros(8192, dtype=BF16))


def _our_nf4() -> None:
    packed, scales = torch.zeros(4096, 1, dtype=torch.uint8), torch.zeros(128)
    CUDA_LAUNCHERS["nf4_dequantize"](packed, [scales], 64, [8192], BF16)


def _attention(launch: str, width: int) -> Launch:
    def attend() -> None:
        make = meta(torch.float16)
        q, k, v, out, grad = (make((2, 8, 1024, width)) for _ in range(5))
        settings = True, width**-0.5, 0.0, None, None
        if launch == "attention_forward":
            CUDA_LAUNCHERS[launch](q, k, v, *settings)
        else:
            CUDA_LAUNCHERS[launch](grad, q, k, v, out, make((2, 8, 1024), torch.float32), *settings)

    return attend


PAIRS = (
    *(Pair(f"layer norm {n}", "liger_kernel", _liger_norm(n), _our_norm(n)) for n in (768, 4096, 8192)),
    *(
        Pair(f"cross-entropy {v}", "liger_kernel", _liger_cross_entropy(v), _our_cross_entropy(v))
        for v in (50257, 50304)
    ),
    Pair("NF4 dequantize", "bitsandbytes", _bitsandbytes, _our_nf4),
)
WIDTHS = (64, 128)


def _tutorial_pairs(path: Path, folder: Path) -> Iterator[Pair]:
    found = static_tutorial.kernels(path, folder)
    for width in WIDTHS:
        q = meta(torch.float16)((2, 8, 1024, width))
        for part, kernel, launch in (
            ("forward", "_attn_fwd", static_tutorial.launch_forward),
            ("backward", "_attn_bwd", static_tutorial.launch_backward),
        ):
            theirs = partial(launch, found[kernel], q)
            with captured_launches():  # a tutorial of another version is told before anything is compiled
                theirs()
            yield Pair(f"attention {part} {width}", "triton", theirs, _attention(f"attention_{part}", width))


def _facts(launch: Launch, target: Target) -> Iterator[tuple[str, dict[str, Any]]]:
    with assumed_architecture(target.name), captured_launches() as launches:
        launch()
    for each in launches:
        yield each.name, asdict(compile_resources(each.specialize(target.gpu), target))


def _most(rows: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Facts of the kernel with most registers."""
    return max((row for _, row in rows), key=lambda row: row["registers"])


def report(tutorial: Path | None) -> None:
    """Prints both kernels' facts on every target, then who spills, and where ours has more registers than a
    peer that spills no more and whose threads hold as large a tile."""
    table = Table(title="peers compiled as ours are")
    for column in (
        "task", "target", "kernel", "registers", "spilled", "shared", "occupancy", "values a thread",
        "values in flight", "128-bit loads",
    ):  # fmt: skip
        table.add_column(column)
    missing = {pair.package for pair in PAIRS if importlib.util.find_spec(pair.package) is None}
    pairs = [pair for pair in PAIRS if pair.package not in missing]
    spill: dict[str, list[str]] = {"ours": [], "theirs": []}
    more = []
    with tempfile.TemporaryDirectory() as folder:
        if tutorial is not None:
            pairs += _tutorial_pairs(tutorial, Path(folder))
        for pair, target in ((pair, target) for pair in pairs for target in TARGETS.values()):
            facts = {
                "theirs": list(_facts(pair.theirs, target)),
                "ours": list(_facts(pair.ours, target)),
            }
            for owner, rows in facts.items():
                name = "tapelm" if owner == "ours" else pair.package
                for kernel, row in rows:
                    lanes = row["occupancy"] * target.warps * target.gpu.warp_size
                    table.add_row(
                        pair.task, target.name, f"{name} {kernel}", str(row["registers"]),
                        str(row["spilled"]), str(row["shared"]), f"{row['occupancy']:.0%}",
                        f"{row['values']:g}", f"{lanes * row['values']:,.0f}", f"{row['wide_loads']:.0%}",
                    )  # fmt: skip
                if worst := max(row["spilled"] for _, row in rows):
                    spill[owner].append(f"{pair.task} {target.name} {worst} bytes")
            ours, theirs = _most(facts["ours"]), _most(facts["theirs"])
            comparable = theirs["spilled"] <= ours["spilled"] and theirs["values"] >= ours["values"]
            if comparable and ours["registers"] > theirs["registers"]:
                more.append(
                    f"{pair.task} {target.name}: {ours['registers']} against {theirs['registers']}, "
                    f"occupancy {ours['occupancy']:.0%} against {theirs['occupancy']:.0%}"
                )
    Console(width=None if Console().is_terminal else 180).print(table)
    of = f"of {len(pairs) * len(TARGETS)}"
    for owner, cases in spill.items():
        print(f"spills, {owner}: {len(cases)} {of}", *cases, sep="\n  ")
    print(f"more registers for no larger a tile, ours: {len(more)} {of}", *more, sep="\n  ")
    if missing:
        print(f'not installed, left out: {", ".join(sorted(missing))}; pip install -e ".[peers]"')
    if tutorial is None:
        print("left out: attention of Triton's tutorial; give its 06-fused-attention.py with --tutorial")

"""Other libraries' Triton kernels compiled as ours are, side by side: python -m benchmarks static --peers.

Liger's layer norm and cross-entropy and bitsandbytes' NF4 dequantization, where installed
(`pip install liger-kernel bitsandbytes`). They are not in the lock file, whose rows must not depend on what
else is installed. Their launchers get small CPU tensors: widths, dtypes and alignment decide the code.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.subjects import BF16, random
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
    ours: Launch | None


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


PAIRS = (
    *(Pair(f"layer norm {n}", "liger_kernel", _liger_norm(n), _our_norm(n)) for n in (768, 4096, 8192)),
    *(
        Pair(f"cross-entropy {v}", "liger_kernel", _liger_cross_entropy(v), _our_cross_entropy(v))
        for v in (50257, 50304)
    ),
    Pair("NF4 dequantize", "bitsandbytes", _bitsandbytes, _our_nf4),
)


def _facts(launch: Launch, target: Target) -> Iterator[tuple[str, dict[str, Any]]]:
    with assumed_architecture(target.name), captured_launches() as launches:
        launch()
    for each in launches:
        yield each.name, asdict(compile_resources(each.specialize(target.gpu), target))


def report() -> None:
    """Prints registers, spilled bytes, shared memory, occupancy and 128-bit loads of both on every target."""
    table = Table(title="peers compiled as ours are")
    for column in (
        "task",
        "target",
        "kernel",
        "registers",
        "spilled",
        "shared",
        "occupancy",
        "128-bit loads",
    ):
        table.add_column(column)
    missing = sorted({pair.package for pair in PAIRS if importlib.util.find_spec(pair.package) is None})
    for pair in PAIRS:
        if pair.package in missing:
            continue
        for target in TARGETS.values():
            for owner, launch in ((pair.package, pair.theirs), ("tapelm", pair.ours)):
                for name, row in _facts(launch, target) if launch is not None else ():
                    table.add_row(
                        pair.task, target.name, f"{owner} {name}", str(row["registers"]), str(row["spilled"]),
                        str(row["shared"]), f"{row['occupancy']:.0%}", f"{row['wide_loads']:.0%}",
                    )  # fmt: skip
    Console(width=160).print(table)
    if missing:
        print(f"not installed, left out: {', '.join(missing)}")

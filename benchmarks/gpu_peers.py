"""Every op, forward and backward in bfloat16, beside PyTorch, torch.compile, SDPA and an installed Liger."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tapelm
from benchmarks.subjects import BF16, SUBJECTS, meta, random
from tapelm._library import architecture
from tapelm.attention import attention_reference
from tapelm.bias_gelu import bias_gelu_reference
from tapelm.layer_norm import layer_norm_reference
from tapelm.linear_cross_entropy import linear_cross_entropy_reference
from tapelm.rms_norm import rms_norm_reference
from tapelm.roofline import DEVICES, minimum
from tapelm.rope import rope_reference
from tapelm.swiglu import swiglu_reference

Function = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """An op as ours, PyTorch's and others' function of the same tensors."""

    op: str
    shapes: tuple[tuple[Any, ...], ...]
    inputs: Callable[..., tuple[Tensor, ...]]
    """Tensors from `make` and a shape; gradients are wanted of those of floating point."""
    ours: Function
    torch: Function
    liger: str = ""
    """Name in liger_kernel.transformers.functional, called with the same tensors and `liger_arguments`."""
    liger_arguments: tuple[Any, ...] = ()
    sdpa: Function | None = None


def _attention(
    make: Function, batch: int, heads: int, key_heads: int, length: int, width: int
) -> tuple[Any, ...]:
    return tuple(make((batch, h, length, width)) for h in (heads, key_heads, key_heads))


def _norm(make: Function, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((cols,))


def _pair(make: Function, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((rows, cols))


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return rms_norm_reference(total, weight), total


def _rope(make: Function, batch: int, heads: int, key_heads: int, length: int, width: int) -> tuple[Any, ...]:
    return make((batch, heads, length, width)), make((batch, key_heads, length, width))


@functools.cache
def _tables(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = 10 ** -torch.linspace(0, 4, width // 2)
    angles = (torch.arange(length)[:, None] * frequencies).repeat(1, 2)
    return angles.cos().to(device, BF16), angles.sin().to(device, BF16)


def _with_tables(rotate: Function) -> Function:
    return lambda q, k: rotate(q, k, *_tables(*q.shape[2:], q.device))


def _hidden(make: Function, rows: int, width: int, vocabulary: int) -> tuple[Any, ...]:
    return make((rows, width)), make((vocabulary, width)), make((rows,), torch.int64) % vocabulary


NORMS = ((4096, 512), (8192, 1024), (4096, 4096))
ELEMENTS = ((4096, 2048), (8192, 3072))
TASKS = (
    Task(
        "attention", ((16, 8, 8, 256, 64), (2, 32, 8, 2048, 128)), _attention, tapelm.attention,
        attention_reference, sdpa=partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    ),
    Task(
        "layer_norm", NORMS, lambda make, rows, cols: (*_norm(make, rows, cols), make((cols,))),
        tapelm.layer_norm, layer_norm_reference, "liger_layer_norm", (1e-5,),
    ),
    Task("rms_norm", NORMS, _norm, tapelm.rms_norm, rms_norm_reference, "liger_rms_norm", (1e-5,)),
    Task(
        "add_norm", NORMS, lambda make, rows, cols: (*_pair(make, rows, cols), make((cols,))),
        tapelm.add_rms_norm, _add_rms_norm, "liger_fused_add_rms_norm", (1e-5,),
    ),
    Task("bias_gelu", ELEMENTS, _norm, tapelm.bias_gelu, bias_gelu_reference),
    Task("swiglu", ELEMENTS, _pair, tapelm.swiglu, swiglu_reference, "liger_swiglu"),
    Task(
        "dropout", ELEMENTS, lambda make, rows, cols: (make((rows, cols)),),
        partial(tapelm.dropout, p=0.1), partial(F.dropout, p=0.1),
    ),
    Task(
        "rope", ((2, 32, 8, 2048, 64), (2, 32, 8, 2048, 128)), _rope,
        _with_tables(tapelm.rope), _with_tables(rope_reference),
    ),
    Task(
        "linear_cross_entropy", ((4096, 768, 50257), (4096, 768, 50304)), _hidden,
        tapelm.linear_cross_entropy, linear_cross_entropy_reference, "liger_fused_linear_cross_entropy",
    ),
)  # fmt: skip


def measure(
    device: torch.device, deadline: float, bench: Function, tasks: Sequence[Task] = TASKS,
    compiled: Callable[[Function], Function] = torch.compile,
) -> tuple[list[dict[str, Any]], list[str]]:  # fmt: skip
    """A row of milliseconds for each task and shape; and what was left out."""
    rows, left = [], []
    liger = importlib.util.find_spec("liger_kernel") is not None and device.type == "cuda"
    for task in tasks:
        for shape in task.shapes:
            name = "x".join(map(str, shape))
            if time.monotonic() > deadline:
                left.append(f"{task.op} {name}")
                continue
            inputs = task.inputs(random(BF16, partial(Tensor.to, device=device)), *shape)
            variants = {"torch": task.torch, "compile": compiled(task.torch), "tapelm": task.ours}
            if task.sdpa is not None:
                variants["sdpa"] = task.sdpa
            if liger and task.liger:
                functional = importlib.import_module("liger_kernel.transformers.functional")
                function = getattr(functional, task.liger)
                variants["liger"] = lambda *tensors, f=function, t=task: f(*tensors, *t.liger_arguments)
            row: dict[str, Any] = {
                "op": task.op,
                "shape": name,
                "predicted_ms": predicted(task, shape, device),
            }
            for variant, function in variants.items():
                row[variant] = timed(variant, partial(forward_backward, function, inputs), bench)
            rows.append(row)
    return rows, left


def timed(variant: str, function: Function, bench: Function) -> float | str:
    """Median milliseconds; of a peer that does not run here, its error."""
    try:
        return float(bench(function, warmup=5, rep=20, return_mode="median"))
    except Exception as error:
        if variant == "tapelm":
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def forward_backward(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else [each for each in results if each is not None]
    return torch.autograd.grad(
        results, [x for x in leaves if x.requires_grad], [torch.ones_like(y) for y in results]
    )


def predicted(task: Task, shape: tuple[Any, ...], device: torch.device) -> float | None:
    """Milliseconds of the op's launchers at the ceilings of the device's datasheet, None for another one."""
    ceilings = DEVICES.get(architecture(device))
    if ceilings is None:
        return None
    passes = [s for s in SUBJECTS if s.launcher in (task.op, f"{task.op}_forward", f"{task.op}_backward")]
    # dropout and rope run the same launcher in both directions.
    passes = passes * 2 if len(passes) == 1 and task.op in ("dropout", "rope") else passes
    work = [minimum(s.launcher, *s.arguments(meta(BF16), *shape)) for s in passes]
    return 1e3 * sum(each.seconds(ceilings, BF16) for each in work)


def report(rows: list[dict[str, Any]]) -> None:
    """Prints a line per op and shape, a column per implementation."""
    table = Table(title="forward + backward in bfloat16, milliseconds")
    columns = ("predicted_ms", "tapelm", "torch", "compile", "sdpa", "liger")
    for column in ("op", "shape", *columns):
        table.add_column(column, justify="left" if column in ("op", "shape") else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        shown = (
            "" if cell is None else cell[:24] if isinstance(cell, str) else f"{cell:.3f}" for cell in cells
        )
        table.add_row(row["op"], row["shape"], *shown)
    Console(width=150).print(table)

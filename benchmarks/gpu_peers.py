"""Every op, forward and backward in bfloat16, beside PyTorch, torch.compile, SDPA and an installed Liger.

Results are compared with PyTorch's before anything is timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tapelm
from benchmarks.gpu_parts import Unit
from benchmarks.harness import reason
from benchmarks.subjects import BF16, SUBJECTS, meta, random
from tapelm.attention import attention_reference
from tapelm.bias_gelu import bias_gelu_reference
from tapelm.layer_norm import layer_norm_reference
from tapelm.linear_cross_entropy import linear_cross_entropy_reference
from tapelm.rms_norm import rms_norm_reference
from tapelm.roofline import datasheet, minimum
from tapelm.rope import rope_reference
from tapelm.swiglu import swiglu_reference
from tapelm.testing import assert_close

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


def compile_for_shape(function: Function, **options: Any) -> Function:
    """torch.compile for one shape: having seen another one, it would take sizes for variables."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **options)


def peers(
    device: torch.device, bench: Function = triton.testing.do_bench, tasks: Sequence[Task] = TASKS,
    compiled: Callable[[Function], Function] = compile_for_shape,
) -> list[Unit]:  # fmt: skip
    """Of every task and shape; the first shapes of all before the second ones, as the time may not do."""
    each = [(index, task, shape) for task in tasks for index, shape in enumerate(task.shapes)]
    return [
        Unit(task.op, "x".join(map(str, shape)), partial(measure, task, shape, device, bench, compiled))
        for _, task, shape in sorted(each, key=lambda found: found[0])
    ]


def measure(
    task: Task, shape: tuple[Any, ...], device: torch.device, bench: Function,
    compiled: Callable[[Function], Function],
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of every implementation; a peer's error in place of its time, ours also as `error`."""
    inputs = task.inputs(random(BF16, device=device), *shape)
    variants = {"torch": task.torch, "compile": compiled(task.torch), "tapelm": task.ours}
    if task.sdpa is not None:
        variants["sdpa"] = task.sdpa
    if task.liger and device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        functional = importlib.import_module("liger_kernel.transformers.functional")
        function = getattr(functional, task.liger)
        variants["liger"] = lambda *tensors: function(*tensors, *task.liger_arguments)
    row: dict[str, Any] = {"predicted_ms": predicted(task, shape, device), **compare(task, inputs)}
    if "error" not in row:
        for variant, run in variants.items():
            row[variant] = timed(partial(forward_backward, run, inputs), bench)
        if isinstance(row["tapelm"], str):
            row["error"] = row["tapelm"]
    return row


def compare(task: Task, inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """`error` where our results differ from PyTorch's in float32 by more than the tests allow; `compared`
    where there is nothing to hold them against."""
    if task.op == "dropout":
        return {"compared": "no: it drops other elements than PyTorch"}
    try:
        exact = forward_backward(task.torch, tuple(_widened(x) for x in inputs))
        theirs = forward_backward(task.torch, inputs)
    except torch.OutOfMemoryError as error:
        return {"compared": f"no: PyTorch: {reason(error)}"}
    try:
        ours = forward_backward(task.ours, inputs)
        for index, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
            assert_close(f"result {index}", BF16, a, b, c)
    except AssertionError as error:
        return {"error": f"wrong: {error}"}
    return {}


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def timed(function: Function, bench: Function) -> float | str:
    """Median milliseconds, or the error of what does not run here."""
    try:
        return float(bench(function, warmup=5, rep=20, return_mode="median"))
    except Exception as error:
        return reason(error)


def forward_backward(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Results and gradients."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else [each for each in results if each is not None]
    gradients = torch.autograd.grad(
        results, [x for x in leaves if x.requires_grad], [torch.ones_like(y) for y in results]
    )
    return *(result.detach() for result in results), *gradients


def predicted(task: Task, shape: tuple[Any, ...], device: torch.device) -> float | None:
    """Milliseconds of the op's launchers at the ceilings of the device's datasheet, None for another one."""
    ceilings = datasheet(device)
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
    columns = ("predicted_ms", "tapelm", "torch", "compile", "sdpa", "liger", "error")
    for column in ("op", "shape", *columns):
        table.add_column(column, justify="left" if column in ("op", "shape") else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        shown = (
            "" if cell is None else cell[:24] if isinstance(cell, str) else f"{cell:.3f}" for cell in cells
        )
        table.add_row(row["op"], row["shape"], *shown)
    Console(width=150).print(table)

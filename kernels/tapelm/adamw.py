"""AdamW over all tensors in one pass: clip, decay, moments, update.

    g = grad * min(1, max_grad_norm / (norm + 1e-6))        norm = L2 norm over all gradients of all groups
    p *= 1 - lr * weight_decay
    m = m + (g - m) * (1 - beta1)        v = v * beta2 + g * g * (1 - beta2)
    p -= lr / (1 - beta1**step) * m / (sqrt(v / (1 - beta2**step)) + eps)

[Loshchilov and Hutter, "Decoupled weight decay regularization", 2019]. Moments are float32; a bfloat16 or
float16 parameter is the rounded copy of a float32 master. On CUDA all tensors are cut into chunks whose
addresses go to the device in one table, so that one launch updates them all.

Shapes: param, grad, m, v, master alike and contiguous; norm and clip factor () float32, on the device.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ._library import SUPPORTED_DTYPES, register_cuda, register_fake

CHUNK = 65536  # elements per program
BLOCK = 1024


def adamw_reference(
    p: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, step: int, grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition in plain PyTorch, any dtype: the new (p, m, v)."""
    g = grad * grad_scale
    m = m + (g - m) * (1 - betas[0])
    v = v * betas[1] + g * g * (1 - betas[1])
    denominator = (v / (1 - betas[1] ** step)).sqrt() + eps
    return p * (1 - lr * weight_decay) - lr / (1 - betas[0] ** step) * m / denominator, m, v


@triton.jit
def _address(table_ptr, column: tl.constexpr, chunks, dtype: tl.constexpr):
    # Every chunk starts on a 16-byte boundary, which lets loads be 128 bits wide.
    address = tl.load(table_ptr + column * chunks + tl.program_id(0))
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def grad_norm_kernel(table_ptr, partial_ptr, chunks, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """table (2, chunks): address and length; partial (chunks,) sums of squares."""
    grad_ptr = _address(table_ptr, 0, chunks, DTYPE)
    length = tl.load(table_ptr + chunks + tl.program_id(0)).to(tl.int32)
    whole = length // BLOCK * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.float32)
    # Whole blocks go without a mask, which would keep their loads from being 128 bits wide.
    for masked in tl.static_range(2):
        for first in range(whole if masked else 0, length if masked else whole, BLOCK):
            at = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < length if masked else None, other=0.0 if masked else None)
            total += grad.to(tl.float32) * grad.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def adamw_kernel(
    table_ptr, grad_scale_ptr, chunks, beta1, beta2, eps, decay, step_size, inverse_root_correction,
    DTYPE: tl.constexpr, HAS_MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table (6, chunks): addresses of param, grad, m, v and master (param again without one), and length."""
    param_ptr = _address(table_ptr, 0, chunks, DTYPE)
    grad_ptr = _address(table_ptr, 1, chunks, DTYPE)
    m_ptr = _address(table_ptr, 2, chunks, tl.float32)
    v_ptr = _address(table_ptr, 3, chunks, tl.float32)
    master_ptr = _address(table_ptr, 4, chunks, tl.float32)
    length = tl.load(table_ptr + 5 * chunks + tl.program_id(0)).to(tl.int32)
    whole = length // BLOCK * BLOCK
    grad_scale = tl.load(grad_scale_ptr)
    for masked in tl.static_range(2):
        for first in range(whole if masked else 0, length if masked else whole, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < length if masked else None
            g = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * grad_scale
            m = tl.load(m_ptr + at, mask=inside)
            v = tl.load(v_ptr + at, mask=inside)
            p = tl.load(master_ptr + at, mask=inside)
            m = m + (g - m) * (1.0 - beta1)
            v = v * beta2 + g * g * (1.0 - beta2)
            p = p * decay - step_size * (m / (tl.sqrt(v) * inverse_root_correction + eps))
            tl.store(m_ptr + at, m, mask=inside)
            tl.store(v_ptr + at, v, mask=inside)
            tl.store(master_ptr + at, p, mask=inside)
            if HAS_MASTER:
                tl.store(param_ptr + at, p.to(DTYPE), mask=inside)


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _chunk_table(*columns: list[Tensor]) -> Tensor:
    """(len(columns) + 1, chunks) int64 on the tensors' device: chunk addresses per column, then lengths."""
    sizes = np.array([tensor.numel() for tensor in columns[0]], dtype=np.int64)
    counts = -(-sizes // CHUNK)
    owner = np.repeat(np.arange(len(sizes)), counts)
    offset = (np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)) * CHUNK
    table = np.empty((len(columns) + 1, len(owner)), dtype=np.int64)
    for row, tensors in zip(table, columns, strict=False):
        addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
        if (addresses % 16)[sizes > 0].any():
            raise ValueError(
                "adamw: a tensor does not start on a 16-byte boundary; clone() it into its own storage."
            )
        row[:] = addresses[owner] + offset * tensors[0].itemsize
    table[-1] = np.minimum(sizes[owner] - offset, CHUNK)
    device = columns[0][0].device
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@register_cuda("grad_norm")
def launch_grad_norm(grads: list[Tensor]) -> Tensor:
    """Triton launch of ``tapelm::grad_norm``, one per dtype among the gradients."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_dtype[grad.dtype].append(grad.contiguous())
    partials = []
    for dtype, tensors in by_dtype.items():
        table = _chunk_table(tensors)
        chunks = table.shape[1]
        partials.append(torch.empty(chunks, dtype=torch.float32, device=tensors[0].device))
        if chunks:
            grad_norm_kernel[(chunks,)](
                table, partials[-1], chunks, DTYPE=_TRITON_DTYPES[dtype], BLOCK=BLOCK, num_warps=4
            )
    return torch.cat(partials).sum().sqrt()


@register_cuda("adamw_step_")
def launch_adamw_step_(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor],
    masters: list[Tensor], grad_scale: Tensor, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, step: int,
) -> None:  # fmt: skip
    """Triton launch of ``tapelm::adamw_step_``; all params of one dtype."""
    grads = [grad.contiguous() for grad in grads]
    table = _chunk_table(params, grads, exp_avg, exp_avg_sq, masters or params)
    if chunks := table.shape[1]:
        adamw_kernel[(chunks,)](
            table, grad_scale, chunks, beta1, beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step),
            (1 - beta2**step) ** -0.5,
            DTYPE=_TRITON_DTYPES[params[0].dtype], HAS_MASTER=bool(masters), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@register_fake("grad_norm")
def _(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


@register_fake("adamw_step_")
def _(params: list[Tensor], *args: Any) -> None:
    return None


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay and optional clipping by the global norm; a ``torch.optim.Optimizer``.

    Args:
        params: contiguous float32 or bfloat16 tensors (on CUDA also float16), or dicts of parameter groups.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; per group.
        max_grad_norm: gradients of all groups together are scaled down to this L2 norm; None does not clip.
        state_bits: bits of the stored moments; 32 is the only choice.

    ``state[p]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, for half-precision parameters, the float32
    ``master``. With ``max_grad_norm`` set, ``grad_norm`` is a 0-d tensor on the device of the first parameter
    that every step overwrites with the norm before clipping; NaN before the first.

    Raises:
        ValueError: hyperparameters out of range, state_bits other than 32, parameters not contiguous.
        TypeError: unsupported parameter dtypes or sparse gradients.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, max_grad_norm: float | None = None,
        state_bits: int = 32,
    ) -> None:  # fmt: skip
        if state_bits != 32:
            raise ValueError(f"AdamW: state_bits is {state_bits}; only 32 exists.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"AdamW: max_grad_norm is {max_grad_norm}; it must be positive, or None for no clipping."
            )
        self.max_grad_norm = max_grad_norm
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Written in place: torch.compile drops what a traced step assigns to attributes of an optimizer.
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self.grad_norm = None if max_grad_norm is None else torch.full((), math.nan, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters and tensors."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"AdamW: {name} is {group[name]}; it must not be negative.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas are {group['betas']}; both must be in [0, 1).")
        for p in group["params"]:
            if p.dtype not in SUPPORTED_DTYPES.get(p.device.type, ()):
                raise TypeError(
                    f"AdamW: params has a {p.dtype} tensor on {p.device}; use float32 or bfloat16."
                )
            if not p.is_contiguous():
                raise ValueError(
                    f"AdamW: params has a tensor of shape {tuple(p.shape)} that is not contiguous."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # One call of the op takes tensors that share hyperparameters, dtype, device and step count.
        buckets: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(p)
                    state["step"] += 1
                    buckets[index, p.dtype, p.device, state["step"]].append(p)
        scales = self._grad_scales([p for params in buckets.values() for p in params])
        for (index, dtype, device, step), params in buckets.items():
            group, states = self.param_groups[index], [self.state[p] for p in params]
            torch.ops.tapelm.adamw_step_(
                params, [p.grad for p in params],
                [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
                [state["master"] for state in states] if dtype != torch.float32 else [],
                scales[device], group["lr"], *group["betas"], group["eps"], group["weight_decay"], step,
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(f"AdamW: a gradient is {p.grad.layout}; sparse gradients are not supported.")
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            if p.dtype != torch.float32:
                state["master"] = p.detach().float()
        return state

    def _grad_scales(self, params: list[Tensor]) -> dict[torch.device, Tensor]:
        """The clip factor on each device; sets ``grad_norm``."""
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for p in params:
            if p.grad is not None:
                by_device[p.device].append(p.grad)
        if self.max_grad_norm is None or not by_device:
            return {device: torch.ones((), device=device) for device in by_device}
        norms = [torch.ops.tapelm.grad_norm(grads) for grads in by_device.values()]
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        if self.grad_norm is not None:
            self.grad_norm.copy_(norm)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return {device: scale.to(device) for device in by_device}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; also reads a ``torch.optim.AdamW`` state."""
        super().load_state_dict(state_dict)
        # The base class casts state to the parameter's dtype; moments and masters stay float32.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True):
            saved = state_dict["state"].get(key)
            if not saved:
                continue
            state = {"step": int(saved["step"])}
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = saved[name].detach().to(p.device, torch.float32, copy=True).contiguous()
            if p.dtype != torch.float32:
                state["master"] = saved.get("master", p).detach().to(p.device, torch.float32, copy=True)
            self.state[p] = state

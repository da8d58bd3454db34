"""AdamW over all tensors in one pass: clip, decay, moments, update.

    g = grad * min(1, max_grad_norm / (norm + 1e-6))        norm = L2 norm over all gradients of all groups
    p *= 1 - lr * weight_decay
    m = m + (g - m) * (1 - beta1)        v = v * beta2 + g * g * (1 - beta2)
    p -= lr / (1 - beta1**step) * m / (sqrt(v / (1 - beta2**step)) + eps)

[Loshchilov and Hutter, "Decoupled weight decay regularization", 2019]. Moments are float32 or block-wise
8-bit (_adamw_states.py); a bfloat16 or float16 parameter is the rounded copy of a float32 master, or bfloat16
alone, rounded stochastically. All that is random is word `element` of the Philox stream whose key is made of
(seed, step): its low 16 bits round the parameter, its high 16 bits the second moment. Elements count through
all parameters, each starting at a multiple of 256. On CUDA all tensors are cut into chunks whose addresses go
to the device in one table, so that one launch updates them all. Given the clip factor, all devices compute
the same bits.

Shapes: param, grad, m, v, master alike and contiguous; scales of 8-bit moments (blocks,); norm and clip
factor () float32, on the device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _adamw_launches as _adamw_launches  # registers the CUDA kernels
from ._adamw_states import QUANT_BLOCK, SMALLEST_QUANTIZED, converted_state, new_state
from ._library import SUPPORTED_DTYPES
from ._sharded import is_sharded, norm_over_ranks, shard_of

_GOLDEN = 0x9E3779B97F4A7C15


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


def random_key(seed: int, step: int) -> int:
    """The Philox key of one step, as a signed 64-bit integer."""
    key = (seed + step * _GOLDEN) % 2**64
    return key - 2**64 if key >= 2**63 else key


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay and optional clipping by the global norm; a ``torch.optim.Optimizer``.

    Args:
        params: contiguous float32 or bfloat16 tensors (on CUDA also float16, and each at a multiple of 16
            bytes), or dicts of parameter groups. Those that FSDP2 has cut into shards (DTensor) are updated
            where they lie, clipped by the norm over all ranks; with 32-bit states and masters only.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; per group.
        max_grad_norm: gradients of all groups together are scaled down to this L2 norm; None does not clip.
        state_bits: bits of the stored moments, 32 or 8; with 8, tensors below 4096 elements still have 32.
        stochastic_seed: None keeps a float32 master of each half-precision parameter. With an integer
            bfloat16 parameters have none and are rounded stochastically instead, by words that depend on
            (seed, step, element) alone; replicas of a model need the same seed. Per group.

    Gradients have the parameter's dtype or float32 (``p.grad_dtype = torch.float32``). ``state[p]`` holds
    ``step``, ``exp_avg``, ``exp_avg_sq``, for 8 bits also ``exp_avg_scale`` and ``exp_avg_sq_scale``, and the
    float32 ``master`` where there is one. With ``max_grad_norm`` set, ``grad_norm`` is a 0-d tensor on the
    device of the first parameter that every step overwrites with the norm before clipping; NaN before.

    Raises:
        ValueError: hyperparameters out of range, state_bits other than 32 and 8, parameters not contiguous.
        TypeError: unsupported parameter or gradient dtypes, sparse gradients.
    """

    _eager = False

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, max_grad_norm: float | None = None,
        state_bits: int = 32, stochastic_seed: int | None = None,
    ) -> None:  # fmt: skip
        if state_bits not in (8, 32):
            raise ValueError(f"AdamW: state_bits is {state_bits}; it must be 32 or 8.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"AdamW: max_grad_norm is {max_grad_norm}; it must be positive, or None for no clipping."
            )
        self.max_grad_norm = max_grad_norm
        self.state_bits = state_bits
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "stochastic_seed": stochastic_seed})
        # Written in place, so that who holds it sees the latest.
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        self.grad_norm = None if max_grad_norm is None else torch.full((), math.nan, device=device)
        if not AdamW._eager:
            # The step count would compile it anew every time. Not a decorator: that would import the compiler
            # together with tapelm, for seconds.
            AdamW._eager = True
            reason = "tapelm.AdamW.step is not compiled"
            AdamW._update = torch.compiler.disable(AdamW._update, reason=reason)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("max_grad_norm", "state_bits", "grad_norm")}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its hyperparameters and tensors."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"AdamW: {name} is {group[name]}; it must not be negative.")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"AdamW: betas are {group['betas']}; both must be in [0, 1).")
        if not isinstance(group["stochastic_seed"], int | None):
            raise TypeError(
                f"AdamW: stochastic_seed is {group['stochastic_seed']!r}; it must be an int or None."
            )
        for p in group["params"]:
            if p.dtype not in SUPPORTED_DTYPES.get(p.device.type, ()):
                raise TypeError(
                    f"AdamW: params has a {p.dtype} tensor on {p.device}; use float32 or bfloat16."
                )
            if p.dtype == torch.float16 and group["stochastic_seed"] is not None:
                raise TypeError("AdamW: float16 is not rounded stochastically; leave stochastic_seed None.")
            if is_sharded(p) and (self.state_bits == 8 or group["stochastic_seed"] is not None):
                raise ValueError(
                    "AdamW: sharded params need state_bits=32 and stochastic_seed=None: blocks and random "
                    "numbers are counted through whole tensors."
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
        self._update()
        return loss

    @torch.no_grad()
    def set_master(self, p: Tensor, value: Tensor) -> None:
        """Goes on from ``value``, of p's shape, in place of the float32 master of p, and rounds it to p.

        A master initialised from a half-precision parameter starts without the bits lost in rounding it.

        Raises:
            ValueError: p has no master here, or ``value`` another shape.
        """
        group = next((g for g in self.param_groups if any(q is p for q in g["params"])), None)
        if group is None or not self._format(p, group)[1]:
            raise ValueError("AdamW: set_master needs a half-precision parameter of this optimizer.")
        if value.shape != p.shape:
            raise ValueError(f"AdamW: value has shape {tuple(value.shape)}; p has {tuple(p.shape)}.")
        self._state_of(p, group)["master"].copy_(value)
        p.copy_(value)

    def _update(self) -> None:
        # One call of the op takes tensors that share hyperparameters, dtypes, device and step count.
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, int]]] = defaultdict(list)
        first_word = 0
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (grad := p.grad) is not None:
                    state = self._state_of(p, group)
                    state["step"] += 1
                    key = (index, p.device, p.dtype, grad.dtype, "exp_avg_scale" in state, state["step"])
                    buckets[key].append((p, first_word))
                first_word += -(-p.numel() // QUANT_BLOCK) * QUANT_BLOCK
        scales = self._grad_scales([p.grad for bucket in buckets.values() for p, _ in bucket])
        for (index, device, *_, step), bucket in buckets.items():
            group, params = self.param_groups[index], [p for p, _ in bucket]
            states = [self.state[p] for p in params]
            torch.ops.tapelm.adamw_step_(
                [shard_of(p) for p in params], [shard_of(p.grad) for p in params],
                *(
                    [shard_of(state[name]) for state in states if name in state]
                    for name in ("exp_avg", "exp_avg_sq", "master", "exp_avg_scale", "exp_avg_sq_scale")
                ),
                [first for _, first in bucket], scales[device], group["lr"], *group["betas"], group["eps"],
                group["weight_decay"], step, random_key(group["stochastic_seed"] or 0, step),
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)

    def _format(self, p: Tensor, group: dict[str, Any]) -> tuple[bool, bool]:
        """Whether p has 8-bit moments, and whether it has a master."""
        eight_bits = self.state_bits == 8 and p.numel() >= SMALLEST_QUANTIZED
        return eight_bits, p.dtype != torch.float32 and group["stochastic_seed"] is None

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(f"AdamW: a gradient is {p.grad.layout}; sparse gradients are not supported.")
        if not self.state[p]:
            self.state[p] = new_state(p, *self._format(p, group))
        return self.state[p]

    def _grad_scales(self, grads: list[Any]) -> dict[torch.device, Tensor]:
        """The clip factor on each device; sets ``grad_norm``."""
        devices = {grad.device for grad in grads}
        if self.max_grad_norm is None or not grads:
            return {device: torch.ones((), device=device) for device in devices}
        # One norm for all that lie on one device and, of shards, are cut alike.
        alike: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
        for grad in grads:
            cut = (grad.device_mesh, grad.placements) if is_sharded(grad) else ()  # type: ignore[attr-defined]
            alike[grad.device, *cut].append(grad)
        norms = []
        for found in alike.values():
            norm = torch.ops.tapelm.grad_norm([shard_of(grad) for grad in found])
            norms.append(norm_over_ranks(norm, found[0]) if is_sharded(found[0]) else norm)
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        if self.grad_norm is not None:
            self.grad_norm.copy_(norm)
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return {device: scale.to(device) for device in devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; also reads a ``torch.optim.AdamW`` state.

        How states are stored stays as this optimizer was made. A state in another format is converted:
        moments to or from 8 bits, to nearest; a missing master from its parameter. The seed is the saved one.
        """
        seeds = [group["stochastic_seed"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        # The base class casts state to the parameter's dtype: it is made anew from what was saved.
        keys = iter([key for group in state_dict["param_groups"] for key in group["params"]])
        for group, seed in zip(self.param_groups, seeds, strict=True):
            saved_seed = group.get("stochastic_seed")
            group["stochastic_seed"] = seed if seed is None or saved_seed is None else saved_seed
            for p, key in zip(group["params"], keys, strict=False):
                if saved := state_dict["state"].get(key):
                    self.state[p] = converted_state(saved, p, *self._format(p, group))

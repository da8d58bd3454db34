"""PyTorch's modules on our kernels: same constructors, parameters, names and state dicts.

    model = tapelm.nn.optimize(model)      # in place: Linear, LayerNorm, RMSNorm and Dropout of any model

What a module takes in is what its op takes: float32 or bfloat16, on CUDA also float16. ``tapelm.hf`` does the
same to models of transformers, with their attention, MLPs and loss.

Shapes: x (..., C); weights as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import dropout
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .swiglu import swiglu

Module = TypeVar("Module", bound=nn.Module)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by ``tapelm.linear``.

    A frozen weight under autograd is left to PyTorch, which then does not compute its gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.weight.requires_grad:
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)

    @classmethod
    def of(cls, module: nn.Linear) -> nn.Module:
        """One with the parameters of ``module``, or ``module`` where it has more of its own."""
        twin = cls(module.in_features, module.out_features, module.bias is not None, device="meta")
        return stand_in(twin, module)


class LMHead(Linear):
    """The last layer of a language model: logits, or with targets their loss, for which none are stored."""

    def forward(self, input: Tensor, targets: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """Logits (..., V) of input (..., C), or their float32 mean cross-entropy with targets (...) int64."""
        if targets is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, targets, bias=self.bias, ignore_index=ignore_index)


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` of the last dimension, with weight and bias, by ``tapelm.layer_norm``.

    Raises:
        ValueError: several dimensions are to be normalised, or weight or bias is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.fits(self):
            raise ValueError(
                f"LayerNorm: {self.extra_repr()}; the kernel normalises one dimension and needs weight and "
                "bias: use torch.nn.LayerNorm."
            )

    @staticmethod
    def fits(module: nn.LayerNorm) -> bool:
        """Whether ``module`` can be one of these."""
        return len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.weight, self.bias, self.eps)

    @classmethod
    def of(cls, module: nn.LayerNorm) -> nn.Module:
        """One with the parameters of ``module``, or ``module`` where it is of a kind that this is not."""
        if not cls.fits(module):
            return module
        return stand_in(cls(module.normalized_shape, module.eps, device="meta"), module)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` of the last dimension, with a weight, by ``tapelm.rms_norm``.

    Raises:
        ValueError: several dimensions are to be normalised, or the weight is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.fits(self):
            raise ValueError(
                f"RMSNorm: {self.extra_repr()}; the kernel normalises one dimension and needs a weight: use "
                "torch.nn.RMSNorm."
            )

    @staticmethod
    def fits(module: nn.RMSNorm) -> bool:
        """Whether ``module`` can be one of these."""
        return len(module.normalized_shape) == 1 and module.weight is not None

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's default is float32's, in which the statistics are, for half precision too.
        return rms_norm(x, self.weight, torch.finfo(torch.float32).eps if self.eps is None else self.eps)

    @classmethod
    def of(cls, module: nn.RMSNorm) -> nn.Module:
        """One with the parameter of ``module``, or ``module`` where it is of a kind that this is not."""
        if not cls.fits(module):
            return module
        return stand_in(cls(module.normalized_shape, module.eps, device="meta"), module)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` by ``tapelm.dropout``, which stores no mask; its masks are not PyTorch's."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input

    @classmethod
    def of(cls, module: nn.Dropout) -> nn.Module:
        """One of the same probability, or ``module`` where it works in place or drops everything."""
        return module if module.inplace or module.p == 1.0 else stand_in(cls(module.p), module)


class SwiGLU(nn.Module):
    """The MLP of Llama, ``down_proj(silu(gate_proj(x)) * up_proj(x))``, by ``tapelm.swiglu``.

    Args:
        hidden_size: C, of what goes in and comes out.
        intermediate_size: columns of gate and up.
        bias: whether the three layers have one.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate_proj: nn.Module = Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj: nn.Module = Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj: nn.Module = Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    @classmethod
    def of(cls, module: Any) -> SwiGLU:
        """One with the three layers of ``module``, which may be of any kind."""
        return adopt(cls(1, 1, device="meta"), module)


TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: Linear.of,
    nn.LayerNorm: LayerNorm.of,
    nn.RMSNorm: RMSNorm.of,
    nn.Dropout: Dropout.of,
}
"""What ``optimize`` exchanges, and how its twin is made."""


def optimize(model: Module) -> Module:
    """Exchanges the Linear, LayerNorm, RMSNorm and Dropout modules inside ``model`` for ours, in place.

    Parameters and state dict stay what they are, so that this works before or after an optimizer is made,
    weights are loaded, or the model is moved. Only modules of exactly these classes are exchanged: their
    subclasses, norms that ours do not compute, and those with parameters, buffers or children of their own,
    stay.

    Returns:
        ``model``.

    Raises:
        ValueError: ``forward`` of one of these modules has been replaced on the instance.
    """
    exchange(model, TWINS)
    return model


def exchange(model: nn.Module, twins: Mapping[type[nn.Module], Callable[[Any], nn.Module]]) -> None:
    """Exchanges every module inside ``model`` whose class is a key of ``twins`` for what its function makes.

    Children come before their parents; a module that is used twice has one twin.
    """
    found = [
        (parent, name, child, f"{path}.{name}".lstrip("."))
        for path, parent in reversed(list(model.named_modules()))
        for name, child in parent._modules.items()
        if type(child) in twins and child is not None
    ]
    for _, _, child, path in found:
        if "forward" in vars(child):
            raise ValueError(
                f"optimize: forward of {path} ({type(child).__name__}) has been replaced, by another library "
                "or by hooks of accelerate; optimize the model before that, or without it."
            )
    made: dict[int, nn.Module] = {}
    for parent, name, child, _ in found:
        if id(child) not in made:
            made[id(child)] = twins[type(child)](child)
        parent._modules[name] = made[id(child)]


def stand_in(twin: nn.Module, module: nn.Module) -> nn.Module:
    """``twin`` with all that ``module`` has, or ``module`` where its parameters, buffers or children are not
    those of ``twin``, as in layers that were pruned, weight-normalised or given a mask."""
    kinds = ("_parameters", "_buffers", "_modules")
    same = all(vars(twin)[kind].keys() == vars(module)[kind].keys() for kind in kinds)
    return adopt(twin, module) if same else module


def adopt(twin: Module, module: nn.Module) -> Module:
    """Gives ``twin`` the parameters, children, hooks, mode and other attributes of ``module``; returns it."""
    for name in twin._parameters:
        twin._parameters[name] = module._parameters[name]
    for name in twin._modules:
        twin._modules[name] = module._modules[name]
    known = vars(twin).copy()
    vars(twin).update({n: value for n, value in vars(module).items() if "hook" in n or n not in known})
    twin.training = module.training
    return twin

"""The linear layer with an adapter; all other modules of the tapelm backend are those of ``tapelm.hf``."""

from __future__ import annotations

from torch import Tensor, nn

import tapelm


class LoraLinear(nn.Module):
    """Frozen weight (N, K), dense or NF4, with trained lora_a (R, K) and lora_b (N, R)."""

    dense: Tensor
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    map: Tensor

    def __init__(self, weight: Tensor, rank: int, scaling: float, *, quantize: bool) -> None:
        super().__init__()
        n, k = weight.shape
        self.shape, self.scaling, self.quantized = (n, k), scaling, quantize
        if quantize:
            state = tapelm.nf4_quantize(weight)
            self.dtype, self.block_size = state.dtype, state.block_size
            for name in ("packed", "absmax", "nested_absmax", "offset", "map"):
                self.register_buffer(name, getattr(state, name))
        else:
            self.dtype = weight.dtype
            self.register_buffer("dense", weight.detach())
        self.lora_a = nn.Parameter(weight.new_zeros(rank, k))
        self.lora_b = nn.Parameter(weight.new_zeros(n, rank))

    @property
    def weight(self) -> Tensor | tapelm.NF4Weight:
        if not self.quantized:
            return self.dense
        return tapelm.NF4Weight(
            self.packed, self.absmax, self.shape, self.dtype, self.block_size, self.nested_absmax,
            self.offset, self.map,
        )  # fmt: skip

    def dense_weight(self) -> Tensor:
        """The frozen weight (N, K) as it takes part in products."""
        weight = self.weight
        return tapelm.nf4_dequantize(weight) if isinstance(weight, tapelm.NF4Weight) else weight

    def forward(self, x: Tensor) -> Tensor:
        return tapelm.lora_linear(x, self.weight, self.lora_a, self.lora_b, self.scaling)

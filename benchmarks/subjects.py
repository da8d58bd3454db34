"""Every Triton launcher with its shapes: one entry puts an op into every proof.

`arguments(make, *shape)` builds the launcher's arguments from `make(size, dtype=None)`, which returns a
tensor of the entry's own dtype unless told otherwise: on the meta device to compile, random on the CPU to
interpret.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Subject:
    """A launcher, what ships of it and what is interpreted of it."""

    launcher: str
    """Its name in `tapelm._library.CUDA_LAUNCHERS`."""
    arguments: Callable[..., tuple[Any, ...]]
    shipped: tuple[tuple[torch.dtype, tuple[Any, ...]], ...]
    """(dtype, shape) to compile ahead of time."""
    odd: tuple[tuple[Any, ...], ...]
    """Small shapes that are no multiples of the blocks, to interpret."""
    large: tuple[Any, ...] | None = None
    """A shape whose counted traffic must be within 5% of the minimum; None where re-reading is by design. Its
    tensors but those of a row are larger than what `tapelm.proofs.traffic` takes to stay in the cache."""


def _attention(
    make: Make, batch: int, heads: int, key_heads: int, time: int, width: int, variant: str = "",
    keys: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """q, k, v as views of one fused projection, as a model passes them; with a number of keys k and v as of a
    cache."""
    if keys is None:
        keys, fused = time, make((batch, time, heads + 2 * key_heads, width)).transpose(1, 2)
        q, k, v = fused.split([heads, key_heads, key_heads], dim=1)
    else:
        q = make((batch, time, heads, width)).transpose(1, 2)
        k, v = (make((batch, key_heads, keys, width)) for _ in range(2))
    seed = make((), torch.int64) if "dropout" in variant else None
    documents = make((batch, keys), torch.int32) if "documents" in variant else None
    settings = ("full" not in variant, width**-0.5, 0.1 if seed is not None else 0.0, seed, documents)
    return q, k, v, *settings


def _attention_backward(
    make: Make, batch: int, heads: int, key_heads: int, time: int, width: int, *rest: Any
) -> tuple[Any, ...]:
    q, k, v, *settings = _attention(make, batch, heads, key_heads, time, width, *rest)
    out, grad = (make((batch, time, heads, width)).transpose(1, 2) for _ in range(2))
    return grad, q, k, v, out, make((batch, heads, time), FP32), *settings


ATTENTION_SHIPPED = (
    (BF16, (16, 8, 8, 256, 64)),
    (BF16, (16, 8, 8, 256, 64, "dropout")),
    (BF16, (4, 12, 12, 1024, 64, "documents")),
    (BF16, (4, 12, 12, 1024, 64, "dropout documents")),
    (BF16, (4, 12, 12, 1024, 64, "full")),
    (BF16, (2, 32, 8, 2048, 128)),
    (BF16, (2, 32, 8, 2048, 128, "dropout")),
    (BF16, (2, 32, 8, 2048, 128, "documents")),
    (BF16, (2, 8, 8, 1024, 100)),  # rows of 200 bytes, which no descriptor takes
    (BF16, (2, 8, 4, 2048, 256)),
    (BF16, (2, 8, 4, 2048, 256, "dropout documents")),
    (FP16, (16, 8, 8, 256, 64)),
    (FP32, (16, 8, 8, 256, 64)),
    (FP32, (16, 8, 8, 256, 64, "dropout")),
    (FP32, (2, 32, 8, 2048, 128)),
    (FP32, (2, 32, 8, 2048, 128, "dropout documents")),
    (FP32, (2, 8, 4, 2048, 256)),
    (FP32, (2, 8, 4, 2048, 256, "dropout documents")),
)
# All queries of a key head are a tile of 16, 32 or 64 rows.
DECODE_SHIPPED = (
    (BF16, (1, 9, 3, 1, 64, "", 4096)),
    (BF16, (4, 8, 8, 24, 64, "", 4096)),
    (BF16, (1, 32, 8, 16, 64, "documents", 4096)),
    (BF16, (8, 32, 8, 1, 128, "", 4096)),
    (BF16, (8, 32, 8, 1, 128, "documents", 4096)),
    (BF16, (64, 32, 8, 1, 128, "", 4096)),  # heads enough: the keys of one are not split
    (BF16, (1, 32, 8, 8, 128, "", 32768)),
    (BF16, (1, 64, 8, 8, 128, "", 32768)),
    (BF16, (2, 8, 8, 1, 100, "", 1024)),
    (BF16, (1, 8, 1, 1, 256, "", 8192)),
    (BF16, (1, 8, 1, 4, 256, "", 8192)),
    (BF16, (1, 8, 1, 8, 256, "documents", 8192)),
    (FP16, (8, 32, 8, 1, 128, "", 4096)),
    (FP32, (1, 9, 3, 1, 64, "", 4096)),
    (FP32, (8, 32, 8, 1, 128, "", 4096)),
    (FP32, (1, 8, 1, 2, 256, "documents", 8192)),
)
ATTENTION_ODD = (
    (1, 1, 1, 1, 16),
    (2, 4, 2, 67, 24),
    (1, 2, 2, 67, 40, "dropout"),
    (2, 2, 1, 67, 17, "documents"),
    (1, 2, 1, 41, 64, "dropout documents full"),
    (1, 1, 1, 35, 128, "full"),
    (1, 2, 1, 1, 24, "", 37),
    (1, 2, 1, 19, 24, "dropout documents", 53),
    (1, 1, 1, 35, 16, "full", 18),
)
# Decoding: several parts of the keys, the last of them shorter.
DECODE_ODD = ((1, 3, 1, 1, 20, "", 700), (1, 6, 2, 3, 64, "documents", 530), (2, 4, 2, 2, 17, "full", 300))
# There are no parts in the backward pass: more than a tile of keys, with descriptors one of 128.
DECODE_BACKWARD_ODD = (
    (1, 3, 1, 1, 20, "", 75),
    (1, 6, 2, 3, 64, "documents", 140),
    (2, 4, 2, 2, 17, "full", 66),
)


def _layer_norm(make: Make, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((cols,)), make((cols,)), 1e-5


def _layer_norm_backward(make: Make, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((rows, cols)), make((cols,)), make((rows,), FP32), make((rows,), FP32)


def _rms_norm(make: Make, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((cols,)), 1e-5


def _rms_norm_backward(make: Make, rows: int, cols: int) -> tuple[Any, ...]:
    return make((rows, cols)), make((rows, cols)), make((cols,)), make((rows,), FP32)


def _add_norm(make: Make, rows: int, cols: int, variant: str = "") -> tuple[Any, ...]:
    dropout = (0.1, make((), torch.int64)) if "dropout" in variant else (0.0, None)
    bias = None if "rms" in variant else make((cols,))
    return make((rows, cols)), make((rows, cols)), make((cols,)), bias, 1e-5, *dropout


def _add_norm_backward(make: Make, rows: int, cols: int, variant: str = "") -> tuple[Any, ...]:
    dropout = (0.1, make((), torch.int64)) if "dropout" in variant else (0.0, None)
    mean = None if "rms" in variant else make((rows,), FP32)
    grad, grad_r, r = (make((rows, cols)) for _ in range(3))
    return grad, grad_r, r, make((cols,)), mean, make((rows,), FP32), *dropout


def _embedding(
    make: Make, batch: int, time: int, vocabulary: int, width: int, variant: str = ""
) -> tuple[Any, ...]:
    dropout = (0.1, make((), torch.int64)) if "dropout" in variant else (0.0, None)
    ids = make((batch, time), torch.int64) % vocabulary
    return ids, make((vocabulary, width)), make((time, width)), *dropout


def _embedding_backward(make: Make, batch: int, time: int, *rest: Any) -> tuple[Any, ...]:
    return make((batch, time, rest[1])), *_embedding(make, batch, time, *rest)


def _rope(make: Make, batch: int, heads: int, key_heads: int, time: int, width: int) -> tuple[Any, ...]:
    fused = make((batch, time, heads + 2 * key_heads, width)).transpose(1, 2)
    q, k, _ = fused.split([heads, key_heads, key_heads], dim=1)
    return q, k, make((time, width)), make((time, width)), False


NORM_SHIPPED = (
    (BF16, (4096, 512)),
    (BF16, (8192, 768)),
    (BF16, (8192, 1024)),
    (BF16, (4096, 4096)),
    (BF16, (2048, 8192)),
    (BF16, (512, 65536)),
    (FP32, (4096, 512)),
    (FP32, (2048, 8192)),
    (FP32, (512, 65536)),
)
NORM_ODD = ((1, 1), (7, 37), (3, 1000), (5, 513))
ADD_NORM_SHIPPED = (
    (BF16, (4096, 512, "dropout")),
    (BF16, (8192, 1024)),
    (BF16, (4096, 2048, "rms")),
    (BF16, (4096, 4096, "rms dropout")),
    (BF16, (512, 65536, "dropout")),
    (FP32, (4096, 512, "dropout")),
    (FP32, (4096, 2048, "rms")),
)
ADD_NORM_ODD = ((7, 37), (3, 1000, "dropout"), (5, 513, "rms dropout"))
EMBEDDING_SHIPPED = (
    (BF16, (8, 256, 10000, 512, "dropout")),
    (BF16, (16, 1024, 50304, 768)),
    (FP32, (8, 256, 10000, 512, "dropout")),
)
EMBEDDING_ODD = ((1, 1, 1, 1), (2, 9, 3, 37), (3, 5, 7, 1100, "dropout"), (2, 20, 2, 26, "dropout"))
ELEMENTWISE_SHIPPED = ((BF16, (4096, 2048)), (BF16, (8192, 3072)), (FP32, (4096, 2048)))


def _linear_cross_entropy(make: Make, rows: int, width: int, vocabulary: int) -> tuple[Any, ...]:
    targets = make((rows,), torch.int64) % vocabulary
    return make((rows, width)), make((vocabulary, width)), targets, make((vocabulary,)), -100, True


def _frozen_cross_entropy(make: Make, rows: int, width: int, vocabulary: int) -> tuple[Any, ...]:
    hidden, weight, targets, _, *settings = _linear_cross_entropy(make, rows, width, vocabulary)
    return hidden, weight, targets, *settings


def _adamw(make: Make, *sizes: Any) -> tuple[Any, ...]:
    """Sizes of the parameters, the last of them maybe a word on how they and their states are stored."""
    *numbers, variant = sizes if isinstance(sizes[-1], str) else (*sizes, "")
    sizes = tuple(numbers)
    params = [make((size,)) for size in sizes]
    grads = [make((size,), FP32 if "float32" in variant else None) for size in sizes]
    masters = [make((size,), FP32) for size in sizes]
    if "8-bit" in variant:
        exp_avg, exp_avg_sq = ([make((size,), torch.uint8) for size in sizes] for _ in range(2))
        scales = [[make((-(-size // 256),), FP32).abs() for size in sizes] for _ in range(2)]
    else:
        exp_avg = [make((size,), FP32) for size in sizes]
        exp_avg_sq, scales = [make((size,), FP32).abs() for size in sizes], [[], []]
    if params[0].dtype == FP32 or "stochastic" in variant:
        masters = []
    first_word = [1024 * index for index in range(len(sizes))]
    settings = (make((), FP32), 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, 0x123456789ABCDEF)
    return params, grads, exp_avg, exp_avg_sq, masters, *scales, first_word, *settings


def _nf4_state(make: Make, elements: int, variant: str) -> list[Tensor]:
    """absmax, or indices of scales with what turns them into scales; blocks of 64."""
    blocks = -(-elements // 64)
    if "nested" not in variant:
        return [make((blocks,), FP32)]
    return [
        make((blocks,), torch.uint8),
        make((-(-blocks // 256),), FP32),
        make((), FP32),
        make((256,), FP32),
    ]


def _nf4_quantize(make: Make, rows: int, cols: int, variant: str = "") -> tuple[Any, ...]:
    # The map of scales is sorted.
    values = make((256,), FP32).sort().values if "nested" in variant else None
    return make((rows, cols)), 64, values


def _nf4_dequantize(make: Make, rows: int, cols: int, variant: str = "") -> tuple[Any, ...]:
    packed = make((-(-rows * cols // 2), 1), torch.uint8)
    return packed, _nf4_state(make, rows * cols, variant), 64, (rows, cols), make(()).dtype


def _lora_linear(make: Make, rows: int, k: int, n: int, rank: int, variant: str = "") -> tuple[Any, ...]:
    weight, state = make((n, k)), []
    if variant != "dense":
        weight, state = make((-(-n * k // 2), 1), torch.uint8), _nf4_state(make, n * k, variant)
    return make((rows, k)), weight, state, 64, make((rank, k)), make((n, rank)), 1.5


def _lora_linear_backward(
    make: Make, rows: int, k: int, n: int, rank: int, variant: str = ""
) -> tuple[Any, ...]:
    x, *rest = _lora_linear(make, rows, k, n, rank, variant)
    return make((rows, n)), x, make((rows, rank)), *rest


LORA_SHIPPED = tuple(
    (dtype, (*shape, variant))
    for dtype, shape, variants in (
        (BF16, (4096, 2048, 2048, 16), ("nested", "nf4", "dense")),
        (BF16, (4096, 2048, 8192, 16), ("nested",)),
        (BF16, (4096, 576, 1536, 32), ("nested",)),
        (FP16, (4096, 2048, 2048, 16), ("nested",)),
        (FP32, (4096, 2048, 2048, 16), ("nested", "dense")),
    )
    for variant in variants
)
LORA_ODD = (
    (1, 1, 1, 1, "nf4"),
    (5, 33, 17, 3, "nested"),
    (7, 66, 9, 2, "dense"),
    (3, 64, 70, 20, "nested"),
    (130, 128, 5, 4, "nf4"),
)
NF4_SHIPPED = (
    (BF16, (2048, 2048, "nested")),
    (BF16, (8192, 2048, "nested")),
    (BF16, (2048, 2048)),
    (FP16, (2048, 2048, "nested")),
    (FP32, (2048, 2048, "nested")),
)
NF4_ODD = ((1, 1), (7, 37, "nested"), (3, 1000), (70, 513, "nested"))
GRADIENTS_SHIPPED = (
    (FP32, (512 * 512, 2048 * 512, 512)),
    (BF16, (512 * 512, 2048 * 512, 512)),
    (BF16, (50257 * 3,)),
)
OPTIMIZER_SHIPPED = (
    *GRADIENTS_SHIPPED,
    (BF16, (512 * 512, 2048 * 512, "float32 gradients")),
    (BF16, (512 * 512, 2048 * 512, "stochastic")),
    (FP32, (512 * 512, 2048 * 512, "8-bit")),
    (BF16, (512 * 512, 2048 * 512, "8-bit")),
    (BF16, (512 * 512, 2048 * 512, "8-bit stochastic")),
)
OPTIMIZER_ODD = (
    (1,),
    (1000, 1, 65537, 1023),
    (700, 3, "float32 stochastic"),
    (70000, 5, "8-bit"),
    (4099, 256, "8-bit float32 stochastic"),
)

SUBJECTS = (
    Subject(
        "attention_forward", _attention, (*ATTENTION_SHIPPED, *DECODE_SHIPPED), (*ATTENTION_ODD, *DECODE_ODD)
    ),
    Subject(
        "attention_backward", _attention_backward, ATTENTION_SHIPPED, (*ATTENTION_ODD, *DECODE_BACKWARD_ODD)
    ),
    Subject("layer_norm_forward", _layer_norm, NORM_SHIPPED, NORM_ODD, (128, 384)),
    Subject("layer_norm_backward", _layer_norm_backward, NORM_SHIPPED, NORM_ODD, (512, 384)),
    Subject("rms_norm_forward", _rms_norm, NORM_SHIPPED, NORM_ODD, (128, 384)),
    Subject("rms_norm_backward", _rms_norm_backward, NORM_SHIPPED, NORM_ODD, (256, 384)),
    Subject("add_norm_forward", _add_norm, ADD_NORM_SHIPPED, ADD_NORM_ODD, (128, 384, "dropout")),
    Subject("add_norm_backward", _add_norm_backward, ADD_NORM_SHIPPED, ADD_NORM_ODD, (256, 384, "dropout")),
    Subject(
        "swiglu_forward",
        lambda make, rows, cols: (make((rows, cols)), make((rows, cols))),
        ELEMENTWISE_SHIPPED,
        NORM_ODD,
        (256, 512),
    ),
    Subject(
        "swiglu_backward",
        lambda make, rows, cols: (make((rows, cols)), make((rows, cols)), make((rows, cols))),
        ELEMENTWISE_SHIPPED,
        NORM_ODD,
        (256, 512),
    ),
    Subject(
        "rope",
        _rope,
        ((BF16, (2, 32, 8, 2048, 64)), (BF16, (2, 32, 8, 2048, 128)), (FP32, (2, 32, 8, 2048, 64))),
        ((1, 1, 1, 1, 2), (2, 4, 2, 7, 6), (1, 3, 1, 5, 80)),
        (1, 34, 34, 16, 64),
    ),
    # Which rows are read is up to the ids: no minimum to compare with.
    Subject("embedding_forward", _embedding, EMBEDDING_SHIPPED, EMBEDDING_ODD),
    Subject("embedding_backward", _embedding_backward, EMBEDDING_SHIPPED, EMBEDDING_ODD),
    Subject(
        "bias_gelu_forward",
        lambda make, rows, cols: (make((rows, cols)), make((cols,))),
        ELEMENTWISE_SHIPPED,
        NORM_ODD,
        (128, 512),
    ),
    Subject(
        "bias_gelu_backward",
        lambda make, rows, cols: (make((rows, cols)), make((rows, cols)), make((cols,))),
        ELEMENTWISE_SHIPPED,
        NORM_ODD,
        (512, 512),
    ),
    Subject(
        "dropout",
        lambda make, *shape: (make(shape), 0.1, make((), torch.int64)),
        ELEMENTWISE_SHIPPED,
        ((1,), (5, 3), (4099,)),
        (128, 512),
    ),
    Subject(
        "linear_cross_entropy_forward",
        _linear_cross_entropy,
        (
            (BF16, (4096, 512, 10000)),
            (BF16, (4096, 768, 50257)),
            (BF16, (4096, 768, 50304)),
            (FP32, (4096, 768, 50257)),
        ),
        ((1, 3, 5), (7, 12, 4099), (3, 8, 257)),
    ),
    # The kernels of the one above.
    Subject(
        "frozen_cross_entropy_forward", _frozen_cross_entropy, (), ((1, 3, 5), (7, 12, 4099), (3, 8, 257))
    ),
    Subject("nf4_quantize", _nf4_quantize, NF4_SHIPPED, NF4_ODD, (128, 512)),
    Subject("nf4_dequantize", _nf4_dequantize, NF4_SHIPPED, NF4_ODD, (272, 512, "nested")),
    Subject("lora_linear_forward", _lora_linear, LORA_SHIPPED, LORA_ODD),
    Subject("lora_linear_backward", _lora_linear_backward, LORA_SHIPPED, LORA_ODD),
    Subject("adamw_step_", _adamw, OPTIMIZER_SHIPPED, OPTIMIZER_ODD, (65536, 131072, 4096)),
    Subject("adamw_step_", _adamw, (), (), (69632, 4096, "8-bit stochastic")),
    Subject(
        "grad_norm",
        lambda make, *sizes: ([make((size,)) for size in sizes],),
        GRADIENTS_SHIPPED,
        ((1,), (1000, 1, 65537, 1023)),
        (65536, 131072, 4096),
    ),
)
NOT_TRITON = ("linear_forward", "linear_backward")
"""Launchers that call cuBLAS only."""


def meta(dtype: torch.dtype) -> Make:
    """`make` for compiling."""
    return lambda size, other=None: torch.empty(size, dtype=other or dtype, device="meta")


def random(
    dtype: torch.dtype, wrap: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    device: torch.device | str = "cpu",
) -> Make:  # fmt: skip
    """`make` for running; `wrap` may move each tensor, between guard bands for example."""
    generator = torch.Generator(device).manual_seed(11)

    def make(size: tuple[int, ...], other: torch.dtype | None = None) -> Tensor:
        kind = other or dtype
        if kind.is_floating_point:
            return wrap(torch.randn(size, generator=generator, device=device).to(kind))
        # Seeds, and ids that an entry takes modulo its vocabulary; else documents and codes.
        high = 2**40 if kind == torch.int64 else 3
        return wrap(torch.randint(0, high, size, generator=generator, device=device).to(kind))

    return make

"""Scaled dot-product attention that never stores the (T, S) weights.

    A = scale * q @ k.T, -inf where key s is hidden from query t: s > t + S - T if causal, or another document
    lse_t = log sum_s exp(A_ts)         P = softmax(A)          R = dropout(P)           out = R @ v
    dv = R.T @ grad       dR = grad @ v.T       delta_t = sum_d grad_td * out_td
    dA = P * (dropout(dR) - delta)              dq = scale * dA @ k           dk = scale * dA.T @ q

[Dao et al., "FlashAttention", 2022; grouped queries: Ainslie et al., "GQA", 2023]. Dropout is that of
``dropout`` with element index ((b * Hq + h) * T + t) * S8 + s, S8 = S rounded up to a multiple of 8.

Shapes: q, out (B, Hq, T, D); k, v (B, Hkv, S, D), Hq % Hkv == 0; lse (B, Hq, T) float32; document_ids (B, S)
int32. Queries are the last T of S tokens where that matters: if causal or with document ids. Scores, softmax
and sums are float32. Backward runs one kernel per block of keys and one per block of queries, so each
gradient element is summed by one program in a fixed order. Tiles whose pairs are all hidden, by causality or
by document ids, are skipped. The Triton kernels are in ``_attention_kernels``, those for a few queries at the
end of many keys, as in decoding, in ``_attention_decode_kernels``.
"""

# Triton's stubs do not know its own language and launch options.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._attention_configs import describable, launch_config, operands
from ._attention_decode_kernels import is_decoding, launch_decode
from ._attention_kernels import (
    GRAIN,
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
    attention_delta_kernel,
    attention_forward_kernel,
    document_spans_kernel,
)
from ._library import (
    autocast,
    check_is_tensor,
    check_probability,
    check_tensors,
    draw_seed,
    next_power_of_2,
    register_cuda,
    register_fake,
)
from ._philox import keep_reference, keep_scale, keep_threshold


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    dropout_p: float = 0.0, seed: Tensor | None = None, document_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition in plain PyTorch, any dtype."""
    _, heads, time, width = q.shape
    keys = k.shape[2]
    group = heads // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    hidden = torch.ones(time, keys, dtype=torch.bool, device=q.device).triu(1 + keys - time) & causal
    if document_ids is not None:
        own = document_ids[:, keys - time :]
        hidden = hidden | (own[:, None, :, None] != document_ids[:, None, None, :])
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    if seed is not None:
        index = torch.arange(weights[..., 0].numel(), device=q.device).view(weights.shape[:-1])[..., None]
        index = index * ((keys + 7) // 8 * 8) + torch.arange(keys, device=q.device)
        kept = keep_reference(index, dropout_p, seed)
        weights = torch.where(kept, weights * keep_scale(dropout_p), 0.0)
    return weights @ v


def _rows_contiguous(x: Tensor) -> Tensor:
    """x, copied unless its rows are contiguous and offsets within a head fit in 32 bits."""
    return x if x.stride(3) == 1 and x.stride(2) * x.shape[2] < 2**31 else x.contiguous()


def _check_keys(q: torch.Size, k: torch.Size, causal: bool, document_ids: Tensor | None) -> None:
    """Raises unless heads and rows of shapes q (B, Hq, T, D) and k (B, Hkv, S, D) go together."""
    (_, heads, time, _), (_, key_heads, keys, _) = q, k
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"attention: k has {key_heads} heads; q's {heads} heads must be a multiple of them.")
    if keys == 0 and time:
        raise ValueError(f"attention: k has no rows that q's {time} could attend to.")
    if keys < time and (causal or document_ids is not None):
        raise ValueError(
            f"attention: k has {keys} rows and q {time}, whose tokens are the last of those of k. Pass "
            "causal=False and no document_ids for queries that are not among them."
        )


def _empty_heads(like: Tensor) -> Tensor:
    """(B, H, T, D) stored as (B, T, H, D), which the projection that follows reads without a copy."""
    batch, heads, time, width = like.shape
    return like.new_empty(batch, time, heads, width).transpose(1, 2)


def _before(q: Tensor, k: Tensor) -> int | None:
    """The keys before those of the queries; None, for which no code is compiled, where there are as many."""
    return k.shape[2] - q.shape[2] or None


SPANS = {"GRAINS": 16, "BLOCK": 128, "num_warps": 4}  # of document_spans_kernel


def _documents(document_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous document ids and the spans of their tokens, (B, S / GRAIN, 2) int32."""
    if document_ids is None:
        return None, None
    document_ids = document_ids.contiguous()
    batch, keys = document_ids.shape
    spans = document_ids.new_empty(batch, triton.cdiv(keys, GRAIN.value), 2)
    grid = (batch, triton.cdiv(spans.shape[1], SPANS["GRAINS"]))
    document_spans_kernel[grid](document_ids, spans, keys, **SPANS)
    return document_ids, spans


@register_cuda("attention_forward", q="B Hq T D", k="B Hkv S D", v="B Hkv S D", seed="", document_ids="B S")
def launch_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, dropout_p: float, seed: Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Triton launch of ``tapelm::attention_forward``."""
    _check_keys(q.shape, k.shape, causal, document_ids)
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    batch, heads, time, width = q.shape
    out, lse = _empty_heads(q), torch.empty(batch, heads, time, dtype=torch.float32, device=q.device)
    if not q.numel():
        lse.zero_()
    elif is_decoding(q, k, seed):
        launch_decode(q, k, v, out, lse, causal, scale, document_ids)
    else:
        masked = seed is not None or document_ids is not None
        config = launch_config("forward", q.device, q.itemsize, width, masked, describable(q, k, v))
        attention_forward_kernel[(batch * heads, triton.cdiv(time, config["BLOCK_M"]))](
            *operands(config, (q, "BLOCK_M"), (k, "BLOCK_N"), (v, "BLOCK_N")),
            out, lse, *_documents(document_ids), seed, *(x.stride()[:3] for x in (q, k, v, out)),
            heads, heads // k.shape[1], time, _before(q, k), scale, keep_threshold(dropout_p),
            keep_scale(dropout_p), CAUSAL=causal, **config,
        )  # fmt: skip
    return out, lse


@register_cuda(
    "attention_backward",
    grad="B Hq T D",
    q="B Hq T D",
    k="B Hkv S D",
    v="B Hkv S D",
    out="B Hq T D",
    lse="B Hq T",
    seed="",
    document_ids="B S",
)
def launch_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float,
    dropout_p: float, seed: Tensor | None, document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Triton launch of ``tapelm::attention_backward``."""
    _check_keys(q.shape, k.shape, causal, document_ids)
    grad, q, k, v, out = (_rows_contiguous(x) for x in (grad, q, k, v, out))
    batch, heads, time, width = q.shape
    dq, dk, dv = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    documents = (*_documents(document_ids), seed)
    strides = [x.stride()[:3] for x in (grad, q, k, v)]
    delta = torch.empty_like(lse)
    block_d = max(16, next_power_of_2(width))
    block_m = max(1, 2048 // block_d)  # 16 elements a thread
    attention_delta_kernel[(batch * heads, triton.cdiv(time, block_m))](
        grad, out, delta, strides[0], out.stride()[:3], heads, time,
        D=width, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    rest = (
        heads,
        heads // k.shape[1],
        time,
        _before(q, k),
        scale,
        keep_threshold(dropout_p),
        keep_scale(dropout_p),
    )
    masked = seed is not None or document_ids is not None
    described = describable(grad, q, k, v)
    tiles = ((grad, "BLOCK_M"), (q, "BLOCK_M"), (k, "BLOCK_N"), (v, "BLOCK_N"))
    config = launch_config("keys", q.device, q.itemsize, width, masked, described)
    attention_backward_keys_kernel[(batch * k.shape[1], triton.cdiv(k.shape[2], config["BLOCK_N"]))](
        *operands(config, *tiles), lse, delta, dk, dv, *documents, *strides, dk.stride()[:3], *rest,
        CAUSAL=causal, **config,
    )  # fmt: skip
    config = launch_config("queries", q.device, q.itemsize, width, masked, described)
    attention_backward_queries_kernel[(batch * heads, triton.cdiv(time, config["BLOCK_M"]))](
        *operands(config, *tiles), lse, delta, dq, *documents, *strides, dq.stride()[:3], *rest,
        CAUSAL=causal, **config,
    )  # fmt: skip
    return dq, dk, dv


@register_fake("attention_forward")
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("attention_backward")
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _products(q_shape: Any, k_shape: Any, causal: bool) -> int:
    """Multiply-adds of one (T, D) x (D, S) product over all heads, of the pairs that ``causal`` leaves."""
    batch, heads, time, width = q_shape
    hidden = time * (time - 1) // 2 if causal else 0
    return batch * heads * width * (time * k_shape[2] - hidden)


@register_flop_formula(torch.ops.tapelm.attention_forward)
def _(q: Any, k: Any, v: Any, causal: bool, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * 2 * _products(q, k, causal)


@register_flop_formula(torch.ops.tapelm.attention_backward)
def _(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, *args: Any, out_shape: Any = None
) -> int:
    return 2 * 5 * _products(q, k, causal)


_attention_forward = torch.ops.tapelm.attention_forward.default  # once, as the shapes below


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    dropout_p: float = 0.0, document_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of queries over keys and values.

    Args:
        q: (B, Hq, T, D), D in 1..256; float32 or bfloat16, on CUDA also float16. Any strides.
        k, v: (B, Hkv, S, D) with Hq a multiple of Hkv. Under autocast q, k and v are cast to its dtype.
        causal: query t sees keys s <= t + S - T only: the queries are the last T of S >= T tokens, as those
            that continue cached keys are. Without it, and without document_ids, any S goes with any T.
            Keys and values must be finite where they are hidden, too: a weight of 0 times NaN is NaN.
        scale: factor on the scores; None is D**-0.5.
        dropout_p: probability in [0, 1) of dropping each softmax weight, rounded as that of ``dropout``;
            governed by ``torch.manual_seed``.
        document_ids: (B, S) int32 or None; a query sees keys of its own document only. The documents of the
            queries are the last T of them.

    Returns:
        (B, Hq, T, D), dtype of q, a view of a contiguous (B, T, Hq, D) tensor.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: shapes that do not match, S < T where the queries are the last of the tokens, dropout_p
            outside [0, 1), or devices that differ.
    """
    q, k, v = autocast(q, k, v)
    check_tensors("attention", q=q, k=k, v=v)
    check_probability("attention", "dropout_p", dropout_p)
    q_shape, k_shape = q.shape, k.shape  # once, because each decoded token waits for this
    if len(q_shape) != 4 or not 1 <= q_shape[3] <= 256:
        raise ValueError(f"attention: q is {tuple(q_shape)}; it must be (B, Hq, T, D) with D in 1..256.")
    if len(k_shape) != 4 or k_shape[0] != q_shape[0] or k_shape[3] != q_shape[3] or v.shape != k_shape:
        raise ValueError(
            f"attention: k is {tuple(k_shape)} and v is {tuple(v.shape)}; "
            f"q {tuple(q_shape)} needs both to be (B, Hkv, S, D)."
        )
    _check_keys(q_shape, k_shape, causal, document_ids)
    if document_ids is not None:
        check_is_tensor("attention", "document_ids", document_ids)
        if document_ids.dtype != torch.int32:
            raise TypeError(f"attention: document_ids are {document_ids.dtype}; pass document_ids.int().")
        if document_ids.shape != (q_shape[0], k_shape[2]) or document_ids.device != q.device:
            raise ValueError(
                f"attention: document_ids are {tuple(document_ids.shape)} on {document_ids.device}; "
                f"they must be {(q_shape[0], k_shape[2])}, one for each key, on {q.device}."
            )
    scale = q_shape[3] ** -0.5 if scale is None else scale
    seed = draw_seed(q.device) if dropout_p else None
    return _attention_forward(q, k, v, causal, scale, dropout_p, seed, document_ids)[0]

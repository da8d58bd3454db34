"""Checks of the model that is about to be trained, in seconds: a run starts only when all of them pass.

    packing      the logits of a document do not change with what lies before it in its row, and equal those
                 of the document alone
    gradients    after a pass without gradients, as every evaluation is, the gradients of both matrices of
                 every adapter equal those of the block in float32 over the dequantized weights, in plain
                 PyTorch
    adapter      what is written to an adapter directory is what is read back

Blocks are compared one by one, each on the same input and upstream gradient, so that one float32 block is
held at a time, errors do not add up over the layers, and the culprit is named.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.cli import UserError
from llama_lora import adapters as files
from llama_lora.adapters import Adapter, Recipe
from llama_lora.backends import Backend
from llama_lora.dataset import Example
from llama_lora.packing import PackedBatch, collate

LENGTHS = (23, 41)  # tokens of the two documents; odd, so that blocks of keys end inside them
LEAST_COSINE = 0.999
MOST_STRETCH = 0.05  # of a gradient's length, which a cosine does not see
LEAST_UPSTREAMS, LEAST_DIRECTIONS = 2, 8
"""Upstream gradients, and they times the rank: each gives as many numbers B^T dy a token as the rank is. With
fewer, some matrix of a deep model has by chance a gradient that is small beside the rounding of bf16."""
MOST_LEAK = 1e-4
# Relative to the norm of the logits; in bfloat16 sums over keys are rounded in another order.
MOST_PACKED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found: the largest differences and the smallest cosine, with the adapter it belongs to."""

    leak: float
    packed_error: float
    cosine: float
    worst: str


def verify(backend: Backend, model: Any, recipe: Recipe, base: Path, device: torch.device) -> Report:
    """Run all checks on a model of `backend.load`. Raises UserError naming the culprit of the first failure.

    The model is as it was afterwards, its generators too.
    """
    was_training, config = model.training, model_config(model)
    model.eval()
    leak, packed_error = check_packing(backend, model, config.vocab_size, device)
    cosine, worst = 1.0, ""
    adapters = backend.adapters(model)
    if adapters:
        saved = {name: (a.lora_a.detach().clone(), a.lora_b.detach().clone()) for name, a in adapters.items()}
        try:
            randomize(adapters, recipe.scaling)
            cosine, worst = check_gradients(model, adapters, recipe, device)
            check_round_trip(adapters, recipe, base)
        finally:
            with torch.no_grad():
                for name, (lora_a, lora_b) in saved.items():
                    adapters[name].lora_a.copy_(lora_a)
                    adapters[name].lora_b.copy_(lora_b)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return Report(leak, packed_error, cosine, worst)


def model_config(model: Any) -> Any:
    return blocks_of(model)[1]


def blocks_of(model: Any) -> tuple[Any, Any]:
    """The LlamaModel inside a model of any backend, and its configuration."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model, inner.config


def check_packing(backend: Backend, model: Any, vocab_size: int, device: torch.device) -> tuple[float, float]:
    """(change of a document's logits with the one before it, their relative error against it alone)."""
    generator = np.random.default_rng(0)
    first, other, second = (
        _example(generator.integers(0, vocab_size, size)) for size in (LENGTHS[0], LENGTHS[0], LENGTHS[1])
    )
    with torch.no_grad():
        packed, changed, alone = (
            backend.logits(model, collate([row], 0, 0, device))[0, -LENGTHS[1] :].float()
            for row in ((first, second), (other, second), (second,))
        )
    if not bool(packed.isfinite().all()):
        raise UserError(
            "verify: logits of the base model are not finite: its weights are damaged or overflow"
        )
    leak = float((packed - changed).abs().max())
    error = float((packed - alone).norm() / alone.norm())
    dtype = next(model.parameters()).dtype
    # Written so that NaN fails.
    if not leak <= MOST_LEAK:
        raise UserError(
            f"verify: attention leaks across packed documents with the {backend.name} backend: logits change "
            f"by {leak:.2g} with the document before; use --no-packing or --backend tapelm"
        )
    if not error <= MOST_PACKED_ERROR[dtype]:
        raise UserError(
            f"verify: packed logits differ from separate ones by {error:.2g} of their norm with the "
            f"{backend.name} backend: positions or masks are wrong; use --no-packing or --backend tapelm"
        )
    return leak, error


def randomize(adapters: Mapping[str, Adapter], scaling: float) -> None:
    """Normal numbers for both matrices: with lora_b = 0 the gradient of lora_a would be 0.

    scaling * lora_b @ lora_a is as large for every rank and alpha: an update that swamps the base weights
    would be checked at a point which training does not reach, and where bf16 rounds worse.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters.values():
            for tensor, size in ((adapter.lora_a, 0.3), (adapter.lora_b, 0.3 / scaling)):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * size / tensor.shape[1] ** 0.5)


def check_gradients(
    model: Any, adapters: Mapping[str, Adapter], recipe: Recipe, device: torch.device
) -> tuple[float, str]:
    """The smallest cosine between gradients of an adapter here and in the reference, and its name."""
    llama, config = blocks_of(model)
    rows = [[_example(np.random.default_rng(1).integers(0, config.vocab_size, 64))]]
    batch = collate(rows, 0, 0, device)
    worst, name_of_worst = math.inf, ""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        x = llama.embed_tokens(batch.ids)
        angles = llama.rotary_emb(x, position_ids=batch.positions)
    for index, block in enumerate(llama.layers):
        upstreams = [
            torch.randn(x.shape, generator=generator).to(x)
            for _ in range(max(LEAST_UPSTREAMS, math.ceil(LEAST_DIRECTIONS / recipe.rank)))
        ]
        parts = {
            name.removeprefix(f"model.layers.{index}."): adapter
            for name, adapter in adapters.items()
            if name.startswith(f"model.layers.{index}.")
        }
        with torch.no_grad():  # the pass after which gradients must still be right
            following = run_block(block, x, batch, angles)
        matrices = [tensor for part in parts.values() for tensor in (part.lora_a, part.lora_b)]
        found = gradients(run_block(block, x, batch, angles), matrices, upstreams)
        copies = {
            name: (
                part.lora_a.detach().float().requires_grad_(),
                part.lora_b.detach().float().requires_grad_(),
            )
            for name, part in parts.items()
        }
        out = reference_block(block, config, copies, parts, recipe.scaling, x.float(), angles)
        flat = [tensor for pair in copies.values() for tensor in pair]
        expected = gradients(out, flat, upstreams)
        for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            name = f"{('lora_A', 'lora_B')[place % 2]} of layers.{index}.{list(parts)[place // 2]}"
            cosine, stretch = float(F.cosine_similarity(ours, theirs, 0)), float(ours.norm() / theirs.norm())
            if not cosine >= LEAST_COSINE or not abs(stretch - 1) <= MOST_STRETCH:
                raise UserError(
                    f"verify: wrong gradients: {name} has a cosine of {cosine:.4f} to the dequantized "
                    f"reference, and {stretch:.3f} times its length, after a pass without gradients; if "
                    "--backend is hf, use tapelm; else use --precision fp32, and report it as a bug"
                )
            if cosine < worst:
                worst, name_of_worst = cosine, name
        x = following
    return worst, name_of_worst


def gradients(out: Tensor, matrices: Sequence[Tensor], upstreams: Sequence[Tensor]) -> list[Tensor]:
    """Of each matrix its gradients for all upstream ones, in a row: (upstreams * numel,) in float32."""
    found = [torch.autograd.grad(out, matrices, u.to(out), retain_graph=True) for u in upstreams]
    return [
        torch.cat([gradient.float().flatten() for gradient in of_one]) for of_one in zip(*found, strict=True)
    ]


def run_block(block: Any, x: Tensor, batch: PackedBatch, angles: tuple[Tensor, Tensor]) -> Tensor:
    """A decoder block on one document x (1, T, C), in the precision of the run."""
    return block(x, position_embeddings=angles, position_ids=batch.positions, attention_mask=None)


def reference_block(
    block: Any, config: Any, matrices: Mapping[str, tuple[Tensor, Tensor]], parts: Mapping[str, Adapter],
    scaling: float, x: Tensor, angles: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The block in plain PyTorch, float32: x (1, T, C), matrices by layer name as (lora_a, lora_b)."""

    def linear(name: str, x: Tensor) -> Tensor:
        if name not in parts:
            return F.linear(x, block.get_submodule(name).weight.float())
        lora_a, lora_b = matrices[name]
        weight = parts[name].dense_weight().float()
        return F.linear(x, weight) + scaling * F.linear(F.linear(x, lora_a), lora_b)

    def norm(module: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return x * scale * module.weight.float()

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, width).transpose(1, 2)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    width = block.self_attn.head_dim
    cos, sin = (table.float().unsqueeze(1) for table in angles)
    normed = norm(block.input_layernorm, x)
    q, k, v = (heads(linear(f"self_attn.{name}_proj", normed)) for name in "qkv")
    q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(width)
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    x = x + linear("self_attn.o_proj", attended.transpose(1, 2).flatten(2))
    normed = norm(block.post_attention_layernorm, x)
    gated = F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    return x + linear("mlp.down_proj", gated)


def check_round_trip(adapters: Mapping[str, Adapter], recipe: Recipe, base: Path) -> None:
    """Write the adapters, change them, read them back. Raises UserError naming the first that differs."""
    before = {name: tensor.clone() for name, tensor in files.named_tensors(adapters).items()}
    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder), adapters, recipe, base)
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_a.neg_()
                adapter.lora_b.neg_()
        files.load(Path(folder), adapters)
    after = files.named_tensors(adapters)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        raise UserError(f"verify: {changed[0]} is another after writing and reading the adapter")


def _example(ids: np.ndarray) -> Example:
    return Example(ids.astype(np.int64), ids.astype(np.int64))

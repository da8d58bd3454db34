"""The model under both tables of ops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tapelm
from gpt.config import ModelConfig
from gpt.model import GPT, KVCache
from gpt.ops import PLAIN, causal_attention, load_ops

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=97, dropout=0.0)
TABLES = ("plain", "optimized")


def batch(seed: int = 0, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE.vocab_size, (rows, SHAPE.block_size + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def build(table: str, *, dropout: float = 0.0, **options: bool) -> GPT:
    return GPT(dataclasses.replace(SHAPE, dropout=dropout), load_ops(table), **options).initialize(7)  # type: ignore[arg-type]


def optimizer_of(model: GPT, lr: float = 1e-2) -> torch.optim.Optimizer:
    return model.ops.adamw(model.parameter_groups(0.1), lr=lr, betas=(0.9, 0.95), eps=1e-8, max_grad_norm=1.0)


def test_tables_share_names_shapes_and_initial_weights() -> None:
    torch.manual_seed(1)
    plain = build("plain").state_dict()
    torch.manual_seed(2)
    optimized = build("optimized").state_dict()
    assert list(plain) == list(optimized)
    assert all(torch.equal(plain[name], optimized[name]) for name in plain)
    assert plain["blocks.0.contract.weight"].std() < 0.7 * plain["blocks.0.expand.weight"].std()


@pytest.mark.parametrize("table", TABLES)
def test_untrained_loss_is_that_of_a_uniform_guess(table: str) -> None:
    assert build(table)(*batch()).item() == pytest.approx(math.log(SHAPE.vocab_size), rel=0.02)


def test_fifty_losses_of_both_tables_agree() -> None:
    losses = {}
    for table in TABLES:
        model = build(table)
        optimizer = optimizer_of(model)
        losses[table] = []
        for step in range(50):
            loss = model(*batch(seed=step % 5))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[table].append(loss.item())
    assert losses["plain"][-1] < 0.8 * losses["plain"][0]
    assert losses["optimized"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.parametrize("table", TABLES)
def test_first_gradients_match_double_precision(table: str) -> None:
    exact = build("plain").double()
    exact(*batch()).backward()
    model = build(table)
    model(*batch()).backward()
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("table", TABLES)
def test_later_tokens_do_not_reach_earlier_logits(table: str) -> None:
    model, (ids, _) = build(table).eval(), batch()
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % SHAPE.vocab_size
    with torch.no_grad():
        before, after = model.logits(ids), model.logits(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("table", TABLES)
def test_cached_logits_equal_whole_ones(table: str) -> None:
    model, (ids, _) = build(table).eval(), batch()
    cache, parts = KVCache(SHAPE.n_layer, SHAPE.block_size), []
    with torch.no_grad():
        for piece in ids.split([9, 1, 1, 5, 1, 7], dim=1):
            parts.append(model.logits(piece, cache))
        whole = model.logits(ids)
        assert model.logits(ids[:, :0], cache).shape[1] == 0
    assert len(cache) == SHAPE.block_size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="25 tokens do not fit the block of 24"):
        model.logits(ids[:, :1], cache)
    with pytest.raises(ValueError, match="a cache of 8 tokens has no room for 9"):
        model.logits(ids[:, :9], KVCache(SHAPE.n_layer, 8))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_activation_checkpointing_changes_nothing(table: str, dropout: float) -> None:
    results = []
    for checkpointing in (False, True):
        model = build(table, dropout=dropout, activation_checkpointing=checkpointing)
        torch.manual_seed(3)
        loss = model(*batch())
        loss.backward()
        results.append((loss.detach(), *(parameter.grad for parameter in model.parameters())))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("table", TABLES)
def test_dropout_acts_in_training_only(table: str) -> None:
    model = build(table, dropout=0.3)
    assert model(*batch()).item() != model(*batch()).item()
    model.eval()
    assert model(*batch()).item() == build(table).eval()(*batch()).item()


@pytest.mark.parametrize("table", TABLES)
def test_bf16_autocast_stays_close(table: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = build(table)
        loss = model(*batch())
    loss.backward()
    assert loss.item() == pytest.approx(build("plain")(*batch()).item(), rel=0.01)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_bf16_weights_train_with_the_optimizers_master() -> None:
    model = build("optimized").to(torch.bfloat16)
    optimizer, losses = optimizer_of(model), []
    for _ in range(20):
        loss = model(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_only_matrices_decay() -> None:
    decayed, kept = build("plain").parameter_groups(0.1)
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(build("plain").parameters()))


OPS = (
    "embedding", "attention", "layer_norm", "add_layer_norm", "linear", "bias_gelu", "linear_cross_entropy",
    "AdamW",
)  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_optimized_calls_every_tapelm_op_and_plain_none(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def recorded(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(tapelm, name, recorded(name, getattr(tapelm, name)))
    model = build(table, dropout=0.1)
    optimizer = optimizer_of(model)
    model(*batch()).backward()
    optimizer.step()
    assert called == (set(OPS) if table == "optimized" else set())


def test_plain_attention_equals_sdpa_and_its_weights_drop_out() -> None:
    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(causal_attention(q, k, v), expected)
    assert not torch.allclose(causal_attention(q, k, v, 0.5), expected)
    assert PLAIN.attention is causal_attention


@pytest.mark.parametrize("table", TABLES)
def test_optimizer_clips_and_reports_the_norm_before(table: str) -> None:
    model = build(table)
    optimizer = optimizer_of(model)
    (100 * model(*batch())).backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm().item()
    assert expected > 1.0
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)  # type: ignore[attr-defined]


def test_flops_per_token_counts_the_matrix_products() -> None:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        build("plain")(*batch()).backward()
    tokens = 4 * SHAPE.block_size
    # The written-out attention computes the upper triangle too.
    upper = 6 * SHAPE.n_layer * SHAPE.block_size * SHAPE.n_embd
    assert counter.get_total_flops() == tokens * (SHAPE.flops_per_token() + upper)

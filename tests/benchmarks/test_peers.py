"""Peers compute what our model computes; those that are not here are named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import peers, tokenizer
from gpt.cli import UserError
from gpt.config import PRESETS, ModelConfig
from gpt.model import GPT
from gpt.ops import PLAIN

CPU = torch.device("cpu")
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 320}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SHAPES", ((8, 8, 8),))


def test_transformers_gpt2_has_our_loss_and_gradients() -> None:
    pytest.importorskip("transformers")
    ours = GPT(ModelConfig(**TINY, dropout=0.0), PLAIN).initialize(0)
    theirs = peers.GPT2(ours)
    ids = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(0))
    losses = [each(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for each in (ours, theirs)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    theirs_qkv = theirs.inner.transformer.h[1].attn.c_attn.weight.grad.t()
    torch.testing.assert_close(theirs_qkv, ours.blocks[1].attention.qkv.weight.grad, rtol=1e-3, atol=1e-6)


def test_every_peer_is_a_row_or_a_reason() -> None:
    rows, skipped = peers.measure("tiny", 2, CPU, 1, compiled=False, llmc=None)
    assert [row.variant.split()[0] for row in rows][:2] == ["tapelm", "nanoGPT-style"]
    told = " ".join([*skipped, *(row.variant for row in rows)])
    for name in ("nanoGPT", "transformers", "llm.c", "Liger", "Unsloth"):
        assert name in told


PRINTS = """#!/bin/sh
echo "step 0: train loss 5.3 (took 4000.0 ms)"
echo "step 1: train loss 4.3 (took 1500.5 ms)"
echo "step 2: train loss 4.0 (took 1400.0 ms)"
"""


def test_llmc_steps_are_read_without_the_first(tmp_path: Path) -> None:
    binary = tmp_path / "train_gpt2"
    binary.write_text(PRINTS)
    binary.chmod(0o755)
    assert peers.llmc_seconds(binary, 9) == [1.5005, 1.4]
    assert peers.llmc_seconds(binary, 1) == [1.5005]
    binary.write_text("#!/bin/sh\necho 'Error: no gpt2_124M.bin' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"printed no steps, 120 s at most: Error: no gpt2_124M\.bin"):
        peers.llmc_seconds(binary, 9)


def test_llmc_is_stopped_when_it_takes_too_long(tmp_path: Path, monkeypatch) -> None:
    """And what it has printed until then counts, though a C program would still have it in its buffer."""
    binary = tmp_path / "train_gpt2"
    source = PRINTS.replace("#!/bin/sh\n", "").replace('echo "', 'puts("').replace(')"\n', ')");\n')
    (tmp_path / "train.c").write_text(
        f"#include <stdio.h>\n#include <unistd.h>\nint main() {{ {source} sleep(60); }}\n"
    )
    subprocess.run(["cc", str(tmp_path / "train.c"), "-o", str(binary)], check=True)
    monkeypatch.setattr(peers, "LLMC_SECONDS", 1)
    assert peers.llmc_seconds(binary, 9) == [1.5005, 1.4]


def test_a_checkout_that_is_not_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="build it with make train_gpt2"):
        peers.measure_llmc(tmp_path, CPU, 1)


def test_a_peer_of_few_rounds_is_compared_with_all_of_ours() -> None:
    """Ours has one slow round, the first: alone it would be half the ratio."""
    own = [2.0, 1.0, 1.0, 1.0, 1.0]
    few = tokenizer.row("cold", "slow", [10.0], own, 10**6, 1e-3)
    assert few.ratio_vs["tapelm"] == pytest.approx(0.1) and few.extra["ratio_error"] == pytest.approx(0.1)
    noisy = tokenizer.row("cold", "slow", [10.0], [1.0, 2.0, 1.5], 10**6, 1e-3)
    assert noisy.extra["ratio_error"] > 0.3
    paired = tokenizer.row("cold", "fast", [4.0, 2.0, 2.0, 2.0, 2.0], own, 10**6, 1e-3)
    assert paired.ratio_vs["tapelm"] == 0.5 and paired.extra["ratio_error"] == 0.0

"""Generation is timed only when all variants choose the tokens they should; times are told apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generate
from benchmarks.__main__ import main
from benchmarks.commands.everything import try_generation
from benchmarks.generate import BASELINE, Variant, check, decode_bytes, prompt_flops
from benchmarks.harness import WrongResult
from gpt import checkpoint
from gpt.cli import UserError
from gpt.config import PRESETS, ModelConfig
from gpt.model import GPT
from gpt.ops import PLAIN
from tapelm import Tokenizer

CPU = torch.device("cpu")
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": 320}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SHAPES", ((8, 8, 8),))
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 10)
    monkeypatch.setattr(generate, "native_bf16", lambda device: True)


def lively() -> GPT:
    """Weights that repeat no token, as untrained ones would."""
    model = GPT(ModelConfig(**TINY, dropout=0.1), PLAIN).initialize(3).eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(50 if name.startswith("positions") else 8 if parameter.ndim == 2 else 1)
    return model


def test_rows_of_every_variant_from_the_command_line(tmp_path: Path, capsys, clock, monkeypatch) -> None:
    pytest.importorskip("transformers")
    build = generate.build

    def paced(*arguments: Any) -> tuple[list[Variant], list[str]]:
        """The variants, each token of which takes a millisecond: real times of tiny models are noise."""
        variants, skipped = build(*arguments)

        def run_of(variant: Variant) -> Callable[[int], list[int]]:
            return lambda tokens: clock.taking(tokens * 1e-3, variant.run(tokens))()

        return [replace(variant, run=run_of(variant)) for variant in variants], skipped

    monkeypatch.setattr(generate, "build", paced)
    path = tmp_path / "rows.json"
    sizes = ["--prompt-tokens", "6", "--new-tokens", "5", "--rounds", "2", "--device", "cpu"]
    assert main(["generate", "--preset", "tiny", *sizes, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    names = [BASELINE, "plain fp32", "optimized fp32", "transformers fp32", "optimized bf16"]
    names.append("transformers bf16")
    for subject, bound in (("prefill tiny", "GFLOP/s"), ("decode tiny", "GB/s")):
        rows = [row for row in written["rows"] if row["subject"] == subject]
        assert [row["variant"] for row in rows] == names
        for row in rows:
            assert next(iter(row["ratio_vs"])) == BASELINE and bound in row["ceiling"]
            assert f"transformers {'bf16' if 'bf16' in row['variant'] else 'fp32'}" in row["ratio_vs"]
            assert row["shape"] == "6 + 5" and row["extra"]["tokens_per_second"] != 0
    assert written["skipped"] == [] and "decode tiny" in capsys.readouterr().out


def test_all_has_a_short_generation_that_fits_the_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    def measure(*arguments: object) -> tuple[list[str], list[str]]:
        asked.append(arguments)
        return ["row"], ["transformers: not here"]

    monkeypatch.setattr(generate, "measure", measure)
    assert try_generation("seed", CPU, 5) == ["row"] == try_generation("demo", CPU, 5)
    assert asked == [(None, "seed", 128, 32, CPU, 5), (None, "demo", 64, 32, CPU, 5)]
    assert "skipped: generation: transformers: not here" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError, WrongResult])
def test_wrong_tokens_end_all_and_noise_does_not(
    error: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*_: object) -> None:
        raise error("as it is")

    monkeypatch.setattr(generate, "measure", measure)
    if error is WrongResult:
        with pytest.raises(WrongResult):
            try_generation("seed", CPU, 5)
    else:
        assert try_generation("seed", CPU, 5) == []
        assert "skipped: generation: as it is" in capsys.readouterr().out


def test_a_further_token_is_the_difference_over_their_number(clock, monkeypatch) -> None:
    def fake(weights: GPT, prompt: list[int], device: torch.device) -> tuple[list[Variant], list[str]]:
        def variant(name: str, first: float, further: float) -> Variant:
            return Variant(name, torch.float32, lambda n: clock.taking(first + further * (n - 1), [0] * n)())

        return [variant(BASELINE, 3.0, 2.0), variant("plain fp32", 3.0, 0.5)], ["no peer"]

    monkeypatch.setattr(generate, "build", fake)
    monkeypatch.setattr(generate, "check", lambda *arguments: None)
    rows, skipped = generate.measure(None, "tiny", 7, 5, CPU, 3)
    times = {(row.subject, row.variant): row for row in rows}
    first, further = times["prefill tiny", "plain fp32"], times["decode tiny", "plain fp32"]
    assert first.median_ms == pytest.approx(3000, rel=1e-3)
    assert first.extra["tokens_per_second"] == pytest.approx(7 / 3, rel=1e-3)
    assert further.median_ms == pytest.approx(500, rel=1e-3)
    assert further.ratio_vs == {BASELINE: pytest.approx(4.0, rel=1e-3)}
    assert further.extra["tokens_per_second"] == pytest.approx(2.0, rel=1e-3)
    assert skipped == ["no peer"]


def test_what_the_ceilings_count() -> None:
    model = lively()
    tables = ("tokens", "positions")
    read = [each.numel() for name, each in model.named_parameters() if not name.startswith(tables)]
    assert decode_bytes(model, torch.bfloat16) == 2 * sum(read)
    block = 4 * 32 * 32 + 2 * 4 * 32 * 32
    scores = sum(2 * 2 * 32 * seen for seen in range(1, 8))  # two products over what each token sees
    assert prompt_flops(model.config, 7) == 2 * (2 * block * 7 + 320 * 32) + 2 * scores


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_other_tokens_are_refused_and_ties_are_not(dtype: torch.dtype) -> None:
    model, prompt = lively(), [5, 9, 2]
    variant = generate.ours(model, prompt, dtype, "optimized")
    check(model, [variant], prompt, 12)
    found = variant.run(12)
    assert len(set(found)) > 3
    wrong = [*found[:8], (found[8] + 1) % 320, *found[9:]]
    with pytest.raises(WrongResult, match="nothing was timed"):
        check(model, [Variant("wrong", dtype, lambda count: wrong)], prompt, 12)
    with pytest.raises(WrongResult, match="made 11 of 12 tokens"):
        check(model, [Variant("short", dtype, lambda count: found[:-1])], prompt, 12)
    twin = (found[0] + 1) % 320
    with torch.no_grad():
        model.head.weight[twin] = model.head.weight[found[0]]
    for chosen in (found[0], twin):
        check(model, [Variant("either", dtype, lambda count, chosen=chosen: [chosen])], prompt, 1)


def test_what_cannot_run_is_named(monkeypatch) -> None:
    monkeypatch.setattr(generate, "native_bf16", lambda device: False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    variants, skipped = generate.build(lively(), [1], CPU)
    assert [variant.name for variant in variants] == [BASELINE, "plain fp32", "optimized fp32"]
    assert skipped[0] == "bf16: this machine does not multiply bfloat16"
    assert skipped[1].startswith("transformers fp32: this needs transformers")


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"20 \+ 5 tokens do not fit the block of 24"):
        generate.measure(None, "tiny", 20, 5, CPU, 1)
    for sizes in ((0, 5), (3, 1)):
        with pytest.raises(UserError, match="--prompt-tokens must be at least 1 and --new-tokens at least 2"):
            generate.measure(None, "tiny", *sizes, CPU, 1)


def test_weights_of_a_checkpoint_are_taken(tmp_path: Path) -> None:
    Tokenizer.train(["prices fell"], 262).save(tmp_path / "tokenizer.json")
    model = lively().to(torch.bfloat16)
    state = {"step": 1, "config": {"kernels": "plain"}, "model": vars(model.config)}
    tensors, root = checkpoint.Tensors(model.state_dict(), {}), tmp_path / "run" / "checkpoints"
    checkpoint.save(root, tensors, state, tokenizer=tmp_path / "tokenizer.json", keep=1)
    taken = generate.weights_of(tmp_path / "run", "seed")
    assert taken.head.weight.dtype == torch.float32
    assert torch.equal(taken.head.weight, model.head.weight.float())

"""Sampling, the cache, and the generate program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gpt.cli import UserError
from gpt.config import ModelConfig, preset
from gpt.generate import Sampling, choose, generate, main
from gpt.model import GPT
from gpt.ops import load_ops
from gpt.train import train

LOGITS = torch.tensor([0.5, 3.0, 1.0, 2.0]).log()  # probabilities proportional to these


def draws(sampling: Sampling, count: int = 400) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([choose(LOGITS, sampling, generator) for _ in range(count)])
    return (torch.bincount(ids, minlength=4) / count).tolist()


def test_temperature_zero_is_greedy() -> None:
    assert draws(Sampling(temperature=0, top_k=3, top_p=0.1), 5) == [0, 1, 0, 0]


def test_samples_follow_the_softmax_at_the_temperature() -> None:
    assert draws(Sampling(temperature=1.0), 4000) == pytest.approx([0.077, 0.462, 0.154, 0.308], abs=0.03)
    squared = [0.25, 9.0, 1.0, 4.0]
    expected = [weight / sum(squared) for weight in squared]
    assert draws(Sampling(temperature=0.5), 4000) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_most_likely() -> None:
    shares = draws(Sampling(temperature=1.0, top_k=2))
    assert shares[0] == shares[2] == 0 and shares[1] == pytest.approx(0.6, abs=0.08)


@pytest.mark.parametrize(("p", "kept"), [(0.46, [1]), (0.5, [1, 3]), (0.78, [1, 2, 3]), (0.95, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_that_reach_p(p: float, kept: list[int]) -> None:
    shares = draws(Sampling(temperature=1.0, top_p=p))
    assert [i for i in range(4) if shares[i]] == kept


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
    ],
)
def test_impossible_sampling_is_refused(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


@pytest.mark.parametrize("table", ("plain", "optimized"))
def test_greedy_text_is_the_same_with_and_without_cache_past_the_block(table: str) -> None:
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=60, dropout=0.1)
    model = GPT(shape, load_ops(table)).initialize(3).eval()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        # An untrained model repeats one token; this one follows its positions.
        parameter.data.mul_(50 if name.startswith("positions") else 8 if parameter.ndim == 2 else 1)
    greedy = Sampling(temperature=0)
    for length in (1, 15, 16, 30):
        prompt = [(7 * i) % 50 for i in range(length)]
        texts = [
            list(generate(model, prompt, greedy, max_new_tokens=50, vocab_size=50, use_cache=cache))
            for cache in (True, False)
        ]
        assert texts[0] == texts[1] and len(texts[0]) == 50
        assert len(set(texts[0])) > 3 and max(texts[0]) < 50


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "vocab_size": 320}
    train(preset("demo", data=tiny_data, out=out, **shape, max_steps=40, learning_rate=1e-2, threads=1))
    return out


def test_program_streams_the_text_it_saves(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for extra in ([], ["--no-cache"], ["--seed", "1"], ["--kernels", "plain"]):
        saved = tmp_path / "new" / "sample.json"
        arguments = ["--checkpoint", str(run), "--prompt", "the economy", "--max-new-tokens", "60"]
        assert main([*arguments, "--json", str(saved), *extra]) == 0
        result, shown = json.loads(saved.read_text()), capsys.readouterr()
        assert shown.out == result["text"] + "\n" and "tokens/s" in shown.err
        assert result["text"].startswith("the economy") and 0 < result["new_tokens"] <= 60
        assert result["ms_per_token"] == result["latency_ms"] / result["new_tokens"]
        assert result["latency_ms"] >= result["first_token_ms"] > 0
        texts.append(result["text"])
    assert texts[0] == texts[1] == texts[3] != texts[2]


def test_checkpoint_of_a_run_or_a_single_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run / "checkpoints" / "step-00000040"
    outputs = []
    for path in (run, one):
        main(["--checkpoint", str(path), "--temperature", "0", "--max-new-tokens", "8"])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_bad_prompts_and_checkpoints_are_user_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt"):
        main(["--checkpoint", str(run), "--prompt", "a <|endoftext|> b"])
    with pytest.raises(UserError, match="no checkpoint in"):
        main(["--checkpoint", str(tmp_path)])


def test_top_k_keeps_no_more_where_logits_are_equal() -> None:
    logits = torch.zeros(50)
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=1.0, top_k=3), generator) for _ in range(200)}
    assert len(drawn) == 3


@pytest.mark.parametrize("temperature", [1e-40, 1e-320])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, -2.0, 2.9])
    assert choose(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0)) == 1

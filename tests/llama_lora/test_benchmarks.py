"""Benchmarks of fine-tuning on a tiny model: what they compare agrees, what they print was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import llama, llama_ladder
from benchmarks.elsewhere import Elsewhere
from gpt.cli import UserError

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(llama, "BLOCK_SIZE", 64)
    monkeypatch.setattr(llama, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(llama, "NEW_TOKENS", 3)
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SHAPES", ((64, 64, 64),))
    monkeypatch.setattr("benchmarks.ceilings.ARRAY_BYTES", 1 << 16)


def test_steps_and_decoding(small, monkeypatch, tiny_model) -> None:
    monkeypatch.setattr(llama, "peak_memory", lambda *arguments: 7)
    saved: list[set[str]] = []
    rows = llama.measure(
        tiny_model, 2, CPU, 1, save=lambda so_far: saved.append({row.subject for row in so_far})
    )
    parts = [f"{part} {method}" for part in ("llama", "decode") for method in llama.METHODS]
    assert saved == [set(parts[:count]) for count in (1, 2, 3, 4)]
    named = {(row.subject, row.variant): row for row in rows}
    for method in ("qlora", "lora"):
        ours, theirs = named[f"llama {method}", "tapelm"], named[f"llama {method}", "hf"]
        assert theirs.ratio_vs == {"hf": 1.0}
        assert ours.ratio_vs["hf"] == pytest.approx(theirs.median_ms / ours.median_ms)
        assert 0 < ours.extra["tokens_per_second"] <= 1e3 * 2 * 64 / ours.median_ms
        assert ours.extra["peak_memory_bytes"] == 7
        assert named[f"decode {method}", "tapelm"].extra["ms_per_token"] > 0


def test_nothing_is_timed_when_the_backends_disagree(small, tiny_model) -> None:
    steps = {name: llama.Step(name, "lora", tiny_model, 1, CPU) for name in llama.BACKENDS}
    llama.agree(steps)
    with torch.no_grad():
        steps["tapelm"].model.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(UserError, match="disagree, nothing was timed"):
        llama.agree(steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", llama.METHODS)
def test_nothing_is_timed_when_decoded_logits_are_wrong(tiny_model, method, dtype) -> None:
    ours = llama.TapelmBackend().load(tiny_model, llama.Recipe(method), dtype, CPU).eval()
    theirs = llama.open_base(tiny_model, dtype).eval()
    llama.check_logits(tiny_model, ours, theirs, [1, 2, 3, 4])
    with torch.no_grad():
        ours.model.norm.weight.mul_(1.06)
    with pytest.raises(UserError, match="nothing was timed"):
        llama.check_logits(tiny_model, ours, theirs, [1, 2, 3, 4])


def test_a_step_by_another_python_is_the_same_step(tiny_model) -> None:
    build = partial(llama.Step, "hf", "lora", tiny_model, 1, CPU)
    here, there = build(), Elsewhere(build, python=Path(sys.executable))
    assert (there.shape, there.tokens, there.dtype) == (here.shape, here.tokens, here.dtype)
    llama.agree({"hf": here, "unsloth": there})
    for _ in range(2):
        here()
        there()
    assert there.losses == pytest.approx(list(map(float, here.losses)), rel=1e-3)
    here.model.get_input_embeddings().weight.data.mul_(1.5)
    with pytest.raises(UserError, match="disagree, nothing was timed"):
        llama.agree({"hf": here, "unsloth": there})


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="it is here")
@pytest.mark.parametrize(
    ("python", "said"),
    [
        (sys.executable, "No module named 'unsloth'"),
        ("no/python", "No such file"),
        ("/bin/false", "says nothing"),
    ],
)
def test_a_python_without_unsloth_is_refused_at_once(monkeypatch, tiny_model, python, said) -> None:
    monkeypatch.setattr(llama, "peak_memory", lambda *arguments: pytest.fail("too late"))
    with pytest.raises(UserError, match=f"--unsloth: .*{said}.*pip install"):
        llama.measure(tiny_model, 1, CPU, 1, Path(python))


def test_a_process_that_ends_is_noticed(tiny_model) -> None:
    build = partial(llama.Step, "hf", "lora", tiny_model, 1, CPU)
    with pytest.raises(UserError, match="no Python that could be started"):
        Elsewhere(build, python=tiny_model / "python")
    with pytest.raises(UserError, match="own process has ended"):
        Elsewhere(build, python=Path("/bin/true"))
    step = Elsewhere(build, python=Path(sys.executable))
    step._process.kill()
    with pytest.raises(UserError, match="own process has ended"):
        step()
    step.close()


@pytest.mark.slow
def test_peak_memory_is_that_of_a_new_process(tiny_model) -> None:
    build = partial(llama.Step, "tapelm", "qlora", tiny_model, 1, CPU)
    assert 1e8 < llama.peak_memory(build, Path(sys.executable)) < 4e9
    with pytest.raises(UserError, match=r"no model in .*nowhere"):
        llama.peak_memory(
            partial(llama.Step, "tapelm", "qlora", tiny_model / "nowhere", 1, CPU), Path(sys.executable)
        )


@pytest.mark.parametrize("rung", [llama_ladder.RUNGS[0], llama_ladder.RUNGS[3]], ids=["hf", "tapelm"])
def test_decoding_is_timed_after_a_generation_that_compiles(monkeypatch, rung, tmp_path) -> None:
    counts, recipe = [], SimpleNamespace(rank=8, alpha=16)

    def generate(*arguments: object, max_new_tokens: int, **options: object) -> SimpleNamespace:
        counts.append(max_new_tokens)
        return SimpleNamespace(ms_per_token=1.0)

    theirs = SimpleNamespace(generate=generate, eval=lambda: theirs)
    backend = SimpleNamespace(load=lambda *arguments: theirs, adapters=lambda model: {})
    for name, stub in (
        ("open_tokenizer", lambda model: lambda text: {"input_ids": [1, 2]}),
        ("load", lambda *arguments: (theirs, None)), ("generate", generate),
        ("get_backend", lambda name: backend),
    ):  # fmt: skip
        monkeypatch.setattr(llama_ladder, name, stub)
    monkeypatch.setattr(llama_ladder.files, "read_recipe", lambda folder: (recipe, {}))
    monkeypatch.setattr(llama_ladder.files, "load", lambda *arguments: None)
    found = llama_ladder.decode_latency(rung, tmp_path, tmp_path, CPU)
    assert set(found) == {"decode_ms_cache", "decode_ms_no_cache"}
    each = (
        [2, 1, llama_ladder.NEW_TOKENS] if rung.options["backend"] == "hf" else [2, llama_ladder.NEW_TOKENS]
    )
    assert counts == 2 * each


@pytest.mark.slow
def test_ladder(monkeypatch, tiny_model, tiny_data, tmp_path, capsys) -> None:
    monkeypatch.setattr(llama_ladder, "RUNGS", (llama_ladder.RUNGS[1], llama_ladder.RUNGS[-1]))
    monkeypatch.setattr(llama_ladder, "NEW_TOKENS", 4)
    out = tmp_path / "ladder.json"
    for _ in range(2):  # the second time there is nothing left to do
        llama_ladder.run(tiny_model, tiny_data, tmp_path / "runs", 2, sweeps=False, json_path=out)
    with pytest.raises(UserError, match="is a run of max_steps 2: choose another --out"):
        llama_ladder.run(tiny_model, tiny_data, tmp_path / "runs", 3, sweeps=False, json_path=out)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["bf16", "+ 8-bit optimizer"]
    assert rows[0]["base_perplexity"] > 1 and rows[1]["decode_ms_cache"] > 0
    assert "+ 8-bit optimizer" in capsys.readouterr().out

"""An export computes what the checkpoint does in other libraries, or nothing is written."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tapelm
from gpt import checkpoint, export, extras, gguf_file, gpt2
from gpt import generate as text
from gpt.cli import UserError
from gpt.config import ModelConfig
from gpt.corpus import END_OF_TEXT
from gpt.model import GPT
from gpt.ops import PLAIN

pytest.importorskip("transformers")
FORMATS = ("hf", "gguf")
PROMPTS = ("the economy", "", " prices  of\n12 foods, “fell” 😀")


def save_run(out: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, **shape: Any) -> Path:
    """A run of one checkpoint whose weights, biases and norms included, are all random and matter."""
    given = {"n_layer": 2, "n_head": 3, "n_embd": 33, "block_size": 60, "vocab_size": 320, "dropout": 0.1}
    model = GPT(ModelConfig(**(given | shape)), PLAIN)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim == 2 else 0.2)
        parameter.data = noise + (1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0)
    model = model.to(dtype)
    state = {"step": 3, "config": {"kernels": "plain"}, "model": vars(model.config)}
    tensors = checkpoint.Tensors(model.state_dict(), {})
    checkpoint.save(out / "checkpoints", tensors, state, tokenizer=tokenizer, keep=1)
    return out


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("runs"), tiny_data / "tokenizer.json"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {name: save_run(root / name, tokenizer, dtype) for name, dtype in dtypes.items()}


def program(run: Path, kind: str, out: Path, *options: str) -> int:
    return export.main(["--checkpoint", str(run), "--format", kind, "--out", str(out), *options])


def read(out: Path, kind: str, config: Any = None) -> Any:
    named = {} if kind == "hf" else {"gguf_file": export.GGUF, "config": config}
    return extras.transformers().AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **named)


def logits_of(run: Path, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    model = checkpoint.load_model(run, kernels="plain")[0]
    with torch.no_grad():
        return (model if dtype is None else model.to(dtype)).float().logits(ids)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("stored", "asked"), [("fp32", "auto"), ("bf16", "auto"), ("fp32", "bf16")])
def test_logits_are_those_of_the_checkpoint(stored, asked, kind, runs, tmp_path, capsys) -> None:
    out, bf16 = tmp_path / "new" / "out", "bf16" in (stored, asked)
    assert program(runs[stored], kind, out, "--dtype", asked) == 0
    assert " apart at most, the largest is " in capsys.readouterr().out
    theirs = read(out, kind, gpt2.as_gpt2(checkpoint.load_model(runs[stored])[0]).config)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 320, (4, 60)))
    expected = logits_of(runs[stored], ids, torch.bfloat16 if bf16 else None)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    record = json.loads((out / export.RECORD).read_text())
    assert record["dtype"] == ("bfloat16" if bf16 else "float32") and record["step"] == 3
    assert record["largest_logit_difference"] <= 1e-4
    assert all((path.stat().st_mode & 0o777) == 0o644 for path in out.iterdir())
    if kind == "hf":
        as_it_is = extras.transformers().AutoModelForCausalLM.from_pretrained(out)
        assert as_it_is.dtype == (torch.bfloat16 if bf16 else torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_ids_are_those_of_our_tokenizer_behind_an_end_of_text(kind, runs, tiny_data, tmp_path) -> None:
    program(runs["fp32"], kind, tmp_path / "out")
    named = {} if kind == "hf" else {"gguf_file": export.GGUF}
    theirs = extras.transformers().AutoTokenizer.from_pretrained(tmp_path / "out", **named)
    ours = tapelm.Tokenizer.load(tiny_data / "tokenizer.json")
    end = ours.special_tokens[END_OF_TEXT]
    for prompt in (*PROMPTS, f"one{END_OF_TEXT} two"):
        ids = ours.encode(prompt, allow_special=True).tolist()
        assert theirs(prompt)["input_ids"] == [end, *ids]
        assert theirs(prompt, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == prompt
    assert theirs.bos_token_id == theirs.eos_token_id == end


@pytest.mark.parametrize("stored", ("fp32", "bf16"))
def test_pipeline_continues_a_prompt_as_generate_does(stored, runs, tmp_path, capsys) -> None:
    program(runs[stored], "hf", tmp_path / "out")
    pipeline = extras.transformers().pipeline("text-generation", str(tmp_path / "out"), dtype=torch.float32)
    for prompt in PROMPTS:
        capsys.readouterr()
        text.main(["--checkpoint", str(float_run(runs[stored], tmp_path)), "--prompt", prompt,
                   "--temperature", "0", "--max-new-tokens", "15", "--kernels", "plain"])  # fmt: skip
        ours = capsys.readouterr().out.removesuffix("\n")
        assert len(ours) > len(prompt)
        assert pipeline(prompt, do_sample=False, max_new_tokens=15)[0]["generated_text"] == ours
    # What nobody limits ends with the positions.
    ids = pipeline.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert 0 < pipeline.model.generate(ids).shape[1] <= 60


def float_run(run: Path, tmp_path: Path) -> Path:
    """The weights of `run` in float32."""
    model, saved, state = checkpoint.load_model(run, kernels="plain")
    tensors, out = checkpoint.Tensors(model.float().state_dict(), {}), tmp_path / "float"
    checkpoint.save(out / "checkpoints", tensors, state, tokenizer=saved / "tokenizer.json", keep=1)
    return out


def test_ids_without_a_token_are_never_generated(tiny_data, tmp_path) -> None:
    run = save_run(tmp_path / "run", tiny_data / "tokenizer.json", vocab_size=400)
    program(run, "hf", tmp_path / "out")
    theirs = read(tmp_path / "out", "hf")
    with torch.no_grad():
        theirs.lm_head.weight[300:] *= 50
    drawn = theirs.generate(torch.tensor([[0, 5]]), do_sample=True, max_new_tokens=30)
    assert drawn.max() < 300


def test_vocabulary_of_bytes_and_special_tokens_alone(tmp_path) -> None:
    """As the tape of numbers has it: its bins are bytes."""
    specials = (END_OF_TEXT, "<|jan mon|>", "<|the euro in yen|>")
    tapelm.Tokenizer.train(["0"], 259, specials).save(tmp_path / "tokenizer.json")
    run = save_run(tmp_path / "run", tmp_path / "tokenizer.json", vocab_size=259)
    program(run, "hf", tmp_path / "out")
    theirs = extras.transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("<|the euro in yen|><|jan mon|>")["input_ids"] == [0, 2, 1]
    with pytest.raises(UserError, match="no tokenizer without merges"):
        program(run, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With keys where queries belong."""
    name = "transformer.h.1.attn.c_attn.weight"
    q, k, v = weights[name].chunk(3, dim=1)
    return weights | {name: torch.cat((k, q, v), dim=1)}


def turned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a square matrix the other way round."""
    name = "transformer.h.0.attn.c_proj.weight"
    return weights | {name: weights[name].t().contiguous()}


def without_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "transformer.h.1.mlp.c_proj.bias"
    return weights | {name: torch.zeros_like(weights[name])}


def not_a_number(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"transformer.ln_f.bias": weights["transformer.ln_f.bias"] * float("nan")}


@pytest.mark.parametrize("fault", (swapped, turned, without_bias, not_a_number))
def test_a_wrong_conversion_is_refused(fault: Callable[..., Any], runs, tmp_path, monkeypatch) -> None:
    right = gpt2.gpt2_weights
    monkeypatch.setattr(gpt2, "gpt2_weights", lambda model: fault(right(model)))
    with pytest.raises(UserError, match="logits are off by"):
        program(runs["fp32"], "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("entry", "value"), [("add_head_count", 1), ("add_layer_norm_eps", 1e-3)])
def test_a_wrong_description_in_gguf_is_refused(entry, value, runs, tmp_path, monkeypatch) -> None:
    writer = extras.gguf().GGUFWriter
    right = getattr(writer, entry)
    monkeypatch.setattr(writer, entry, lambda self, _: right(self, value))
    with pytest.raises(UserError, match="logits are off by"):
        program(runs["fp32"], "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_gguf_is_refused(runs, tmp_path, monkeypatch) -> None:
    right = gguf_file.gpt_tensors

    def wrong(model: GPT) -> dict[str, Tensor]:
        tensors = right(model)
        return tensors | {"blk.0.attn_qkv.weight": tensors["blk.0.attn_qkv.weight"].flip(0)}

    monkeypatch.setattr(gguf_file, "gpt_tensors", wrong)
    with pytest.raises(UserError, match="logits are off by"):
        program(runs["fp32"], "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_ids_are_refused(runs, tmp_path, monkeypatch) -> None:
    right = tapelm.Tokenizer.encode
    monkeypatch.setattr(tapelm.Tokenizer, "encode", lambda self, text, **more: right(self, "other", **more))
    with pytest.raises(UserError, match="other ids"):
        program(runs["fp32"], "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_nothing_else_is(runs, tiny_data, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty one holds nothing to lose
    program(runs["fp32"], "hf", out)
    program(runs["bf16"], "hf", out)
    assert json.loads((out / export.RECORD).read_text())["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="an export in the format hf: name another --out"):
        program(runs["fp32"], "gguf", out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is not as the export left it: name another --out"):
        program(runs["fp32"], "hf", out)
    (out / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not as the export left it"):
        program(runs["fp32"], "hf", out)
    for other in (runs["fp32"], tiny_data, tiny_data / "tokenizer.json"):
        with pytest.raises(UserError, match="is no earlier export: name another --out"):
            program(runs["fp32"], "hf", other)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")))
def test_what_is_cut_short_leaves_what_was_there(fault, kind, runs, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    program(runs["fp32"], kind, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def cut(*arguments: Any, **options: Any) -> None:
        raise fault

    for place in ("gpt.export.compare", "gpt.cli.flush", "gpt.export.write_atomically"):
        with monkeypatch.context() as patched:
            patched.setattr(place, cut)
            for target in (out, tmp_path / "new"):
                with pytest.raises(type(fault)):
                    program(runs["bf16"], kind, target)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_cut_between_two_renames_the_old_export_is_put_back(runs, tmp_path, monkeypatch) -> None:
    out, rename = tmp_path / "out", os.replace
    program(runs["fp32"], "hf", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(source: Path, target: Path) -> None:
        if ".tmp-" in str(source) and Path(target) == out:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("gpt.cli.os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            program(runs["bf16"], "hf", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_checkpoints_and_missing_packages_are_user_errors(runs, tmp_path, monkeypatch) -> None:
    damaged = shutil.copytree(runs["fp32"], tmp_path / "damaged")
    weights = damaged / "checkpoints" / "step-00000003" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[random.Random(0).randrange(1000, len(content))] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="does not match its SHA-256"):
        program(damaged, "hf", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint in"):
        program(tmp_path, "hf", tmp_path / "out")
    for missing, kind in (("transformers", "hf"), ("gguf", "gguf")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, missing, None)
            with pytest.raises(UserError, match=rf"this needs {missing}: pip install -e '\.\[llama\]'"):
                program(runs["fp32"], kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()

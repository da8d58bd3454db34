"""A merged model is the base with its adapter, rounded to bf16 once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt import extras
from gpt.cli import UserError
from llama_lora import adapters as files
from llama_lora import gguf_file
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend, open_base
from llama_lora.dataset import Example
from llama_lora.merge import main, merged_model
from llama_lora.packing import collate
from llama_lora.verify import randomize

CPU = torch.device("cpu")


@pytest.fixture
def adapter(tiny_model: Path, tokenizer, tmp_path: Path) -> Path:
    backend, recipe = TapelmBackend(), Recipe("lora", 4, 8.0)
    model = backend.load(tiny_model, recipe, torch.float32, CPU)
    randomize(backend.adapters(model), 1.0)
    files.write(tmp_path / "adapter", backend.adapters(model), recipe, tiny_model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merged_logits_are_those_of_base_and_adapter(adapter, tiny_model) -> None:
    ids = np.arange(20, dtype=np.int64) * 7 % 320
    batch = collate([[Example(ids, ids)]], 0, 0, CPU)
    backend = TapelmBackend()
    adapted = backend.load(tiny_model, Recipe("lora", 4, 8.0), torch.float32, CPU)
    files.load(adapter, backend.adapters(adapted))
    merged = merged_model(tiny_model, adapter)
    base = open_base(tiny_model, torch.float32)
    with torch.no_grad():
        expected = backend.logits(adapted, batch)
        found = merged.float()(input_ids=batch.ids).logits
        apart = (base(input_ids=batch.ids).logits - expected).norm() / expected.norm()
    assert apart > 0.1
    assert (found - expected).norm() / expected.norm() < 0.02


def test_gguf_has_the_same_logits_and_tokens(adapter, tiny_model, tokenizer, tmp_path) -> None:
    out = tmp_path / "merged.gguf"
    main(["--adapter", str(adapter), "--out", str(tmp_path / "merged"), "--gguf", str(out)])
    library, ids = extras.transformers(), torch.arange(40)[None] * 7 % 320
    read = library.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    with torch.no_grad():
        expected = open_base(tmp_path / "merged", torch.float32)(input_ids=ids).logits
        found = read(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-4
    again = library.AutoTokenizer.from_pretrained(tmp_path, gguf_file=out.name)
    text = "prices of food fell by 12 percent"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_rope_scaling_of_llama_3_is_in_the_file(tiny_model) -> None:
    library = extras.transformers()
    config = library.LlamaConfig.from_pretrained(tiny_model)
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 64, **scaling,
    }  # fmt: skip
    model = library.LlamaForCausalLM(config)
    factors = gguf_file.tensors(model)["rope_freqs.weight"]
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(32.0)


def test_program_reports_the_drift_and_overwrites_nothing(
    adapter, tiny_model, tiny_data, tmp_path, capsys
) -> None:
    out, report = tmp_path / "merged", tmp_path / "drift.json"
    arguments = ["--adapter", str(adapter), "--out", str(out), "--data", str(tiny_data), "--block-size", "64"]
    assert main([*arguments, "--json", str(report)]) == 0
    found = json.loads(report.read_text(encoding="utf-8"))
    assert abs(found["drift"]) < 0.02
    assert abs(found["base"] / found["merged"] - 1.0) > 0.02
    said = capsys.readouterr().out
    assert f"the dense base {found['merged']:.3f}" in said and f"base as it is {found['base']:.3f}" in said
    assert open_base(out, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match="exists: name another --out"):
        main(arguments)

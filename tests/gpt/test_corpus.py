"""What gpt.train says of data that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.cli import UserError
from gpt.config import preset
from gpt.corpus import check_shards, no_data, not_out_of_sample, open_loader, open_tokenizer
from gpt.parallel import Ranks
from tapelm import Tokenizer, write_shards

TOKENIZER = Tokenizer.train(["the committee kept the rate"], 270)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        end = TOKENIZER.special_tokens["<|endoftext|>"]
        documents = (np.arange(1, 40) for _ in range(5))
        write_shards(documents, tmp_path / split, vocab_size=TOKENIZER.vocab_size, end_of_text=end)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return tmp_path


def test_data_that_is_none_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "news.txt"
    file.write_text("x")
    assert f"data.prepare --source files --input {file} --out" in no_data(file)
    assert no_data(tmp_path).startswith(f"{tmp_path} is no data directory")
    assert "does not exist" in no_data(tmp_path / "missing")
    with pytest.raises(UserError, match=r"no data directory.*there are no token shards"):
        open_loader(preset("demo", data=tmp_path, out=tmp_path), Ranks(torch.device("cpu")))
    with pytest.raises(UserError, match=r"no data directory.*tokenizer\.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_whole_shards_are_accepted(data: Path) -> None:
    check_shards(data, TOKENIZER)
    assert open_tokenizer(data / "tokenizer.json").vocab_size == TOKENIZER.vocab_size


def test_shards_of_another_vocabulary_are_refused(data: Path) -> None:
    other = Tokenizer.train(["the committee kept the rate"], 265)
    with pytest.raises(UserError, match=r"train was encoded with 270 token ids, but .* has 265"):
        check_shards(data, other)


def test_a_flipped_byte_is_noticed(data: Path) -> None:
    path = data / "val" / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    content[80] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.bin is damaged.*run python -m data\.prepare again"):
        check_shards(data, TOKENIZER)


def test_files_that_are_not_those_of_the_card_are_noticed(data: Path) -> None:
    made = {"tokenizer.json": {"sha256": "0" * 64}}
    (data / "data_card.json").write_text(json.dumps({"outputs": made}))
    with pytest.raises(UserError, match=r"tokenizer\.json is not the one that data\.prepare made.*--force"):
        check_shards(data, TOKENIZER)


def test_held_out_text_that_a_model_may_have_seen_is_told(tmp_path: Path) -> None:
    span = {"first": "2024-05-01", "last": "2024-06-01"}
    card = {"split_dates": {"test_from": "2024-05-01"}, "splits": {"test": {"news": span, "empty": {}}}}
    path = tmp_path / "data_card.json"
    path.write_text(json.dumps(card))
    assert not_out_of_sample(tmp_path, "test", "2024-04-30") is None
    assert not_out_of_sample(tmp_path, "test", None) is None
    told = not_out_of_sample(tmp_path, "test", "2024-05-01")
    assert told is not None and "trained on text released until 2024-05-01" in told
    assert not_out_of_sample(tmp_path, "train", "2024-05-01") is None
    path.write_text(json.dumps(card | {"split_dates": None}))
    assert not_out_of_sample(tmp_path, "test", "2025-01-01") is None

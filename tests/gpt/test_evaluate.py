"""Evaluation against closed forms."""

from __future__ import annotations

import bz2
import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.checkpoint import sha256_of
from gpt.cli import UserError
from gpt.config import ModelConfig, preset
from gpt.corpus import open_tokenizer, read_domains, training_counts
from gpt.evaluate import main, stream_nats, token_stream, unigram_bits
from gpt.model import GPT
from gpt.ops import PLAIN
from gpt.train import train

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50, dropout=0.0)


def test_uniform_model_costs_log_vocabulary_for_every_token() -> None:
    model = GPT(SHAPE, PLAIN).initialize(0).eval()
    torch.nn.init.zeros_(model.head.weight)
    for length in (1, 15, 16, 17, 100):
        stream = np.arange(length, dtype=np.int64) % 50
        assert stream_nats(model, stream, end_of_text=0) == pytest.approx(length * math.log(50), rel=1e-6)


@pytest.mark.parametrize("length", (1, 16, 83))
def test_every_token_is_scored_once_from_its_block(length: int) -> None:
    model = GPT(SHAPE, PLAIN).initialize(0).eval()
    model.head.weight.data.mul_(50)
    stream = np.random.default_rng(0).integers(0, 50, length)
    context, expected = [49, *stream.tolist()], 0.0
    for i, token in enumerate(stream.tolist()):
        block_start = i // 16 * 16
        with torch.no_grad():
            logits = model.logits(torch.tensor([context[block_start : i + 1]]))[0, -1].double()
        expected -= float(logits.log_softmax(0)[token])
    for batch_size in (1, 3):
        nats = stream_nats(model, stream, end_of_text=49, batch_size=batch_size)
        assert nats == pytest.approx(expected, rel=1e-5)


def test_unigram_is_add_one() -> None:
    counts = np.array([6, 1, 0])
    stream = np.array([0, 0, 1, 2])
    expected = -(2 * math.log2(7 / 10) + math.log2(2 / 10) + math.log2(1 / 10))
    assert unigram_bits(counts, stream) == pytest.approx(expected)


def test_training_counts_are_those_of_the_documents(tiny_data: Path) -> None:
    tokenizer = open_tokenizer(tiny_data / "tokenizer.json")
    texts = [
        text for texts in read_domains(tiny_data / "documents" / "train.jsonl").values() for text in texts
    ]
    expected = np.bincount(token_stream(tokenizer, texts), minlength=tokenizer.vocab_size)
    assert np.array_equal(training_counts(tiny_data / "train", tokenizer.vocab_size), expected)


def test_max_bytes_cuts_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    rows = [("a", "xy"), ("b", "ééé"), ("a", "zzzz"), ("a", "never")]
    path.write_text("".join(json.dumps({"source": s, "text": t}) + "\n" for s, t in rows))
    assert read_domains(path) == {"a": ["xy", "zzzz", "never"], "b": ["ééé"]}
    assert read_domains(path, max_bytes=5) == {"a": ["xy", "zzz"], "b": ["éé"]}


@pytest.mark.parametrize(
    "line", ("not json", b"\xff\xfe", '{"text": "no source"}', '{"source": "a", "text": 3}', "[]")
)
def test_broken_documents_are_named(line: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    path.write_bytes(
        b'{"source": "a", "text": "fine"}\n' + (line.encode() if isinstance(line, str) else line)
    )
    with pytest.raises(UserError, match=r"val\.jsonl:2: not a document"):
        read_domains(path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no text"):
        read_domains(path)


def test_program_reports_domains_and_total(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8}
    train(preset("demo", data=tiny_data, out=tmp_path, **shape, max_steps=40, learning_rate=1e-2, threads=1))
    file = tmp_path / "new" / "evaluation.json"
    arguments = ["--checkpoint", str(tmp_path), "--data", str(tiny_data), "--json", str(file)]
    assert main(arguments) == 0
    result = json.loads(file.read_text())
    assert result["max_bytes"] == 0
    assert list(result["domains"]) == ["news", "prices"] and "news" in capsys.readouterr().out
    total, rows = result["total"], result["domains"].values()
    for name in ("bytes", "tokens", "documents"):
        assert total[name] == sum(row[name] for row in rows)
    domains = read_domains(tiny_data / "documents" / "val.jsonl")
    tokenizer = open_tokenizer(tiny_data / "tokenizer.json")
    for name, row in result["domains"].items():
        data = "".join(domains[name]).encode()
        assert row["bytes"] == len(data) and row["documents"] == len(domains[name])
        assert row["tokens"] == len(token_stream(tokenizer, domains[name]))
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / len(data))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bz2_bits_per_byte"] == 8 * len(bz2.compress(data, 9)) / len(data)
        assert row["xz_bits_per_byte"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
    # Forty steps are enough to beat a model that knows only how often tokens occur.
    assert total["bits_per_byte"] < total["unigram_bits_per_byte"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_bits_per_byte"] == pytest.approx(total["bits_per_byte"], rel=0.1)
    documents = sha256_of(tiny_data / "documents" / "val.jsonl")
    assert result["text_sha256"] == summary["text_sha256"] == documents

"""A prepared data directory small enough to train on in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import tapelm

TEXT = "the economy grew by three percent while prices of food and energy fell again in March"
WORDS = TEXT.split(" ")


def sentences(seed: int, count: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(20, 60))) + ".\n" for _ in range(count)]


@pytest.fixture(autouse=True)
def everything_on_one_thread(one_thread):
    """In every test here."""


@pytest.fixture(autouse=True)
def no_ceiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the GEMM ceiling takes longer than the runs of these tests, see measured_ceiling."""
    if "measured_ceiling" not in request.fixturenames:
        monkeypatch.setattr("gpt.session.gemm_peak_flops", lambda device, precision: 1e11)


@pytest.fixture
def measured_ceiling() -> None:
    """Ask for this to let a run measure the GEMM ceiling."""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, three splits, 300 tokens."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "documents").mkdir()
    tokenizer = tapelm.Tokenizer.train(sentences(0, 200), 300)
    tokenizer.save(directory / "tokenizer.json")
    end = tokenizer.special_tokens["<|endoftext|>"]
    for number, (split, count) in enumerate({"train": 200, "val": 60, "test": 60}.items()):
        texts = sentences(number, count)
        with open(directory / "documents" / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for i, text in enumerate(texts):
                source = ("news", "prices")[i % 2]
                record = {"text": text, "source": source, "date": "2020-01-01", "available_at": "2020-01-01"}
                file.write(json.dumps(record) + "\n")
        documents = [[*tokenizer.encode(text).tolist(), end] for text in texts]
        arrays = [np.array(ids, dtype=np.uint32) for ids in documents]
        tapelm.write_shards(arrays, directory / split, vocab_size=300, end_of_text=end)
    return directory

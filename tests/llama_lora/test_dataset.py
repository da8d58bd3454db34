"""Documents and dialogues as ids with targets; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.cli import UserError
from llama_lora.dataset import IGNORED, dialogue, end_of_text, find_split, read_examples

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "did prices fall"},
    {"role": "assistant", "content": "prices fell"},
    {"role": "user", "content": "and energy"},
    {"role": "assistant", "content": "energy fell again"},
]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def learned_text(example, tokenizer) -> str:
    return tokenizer.decode(example.targets[example.targets != IGNORED])


def test_document_is_followed_by_end_of_text(tmp_path, tokenizer) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", {"text": "prices fell"}), tokenizer)
    assert example.ids[-1] == end_of_text(tokenizer)
    assert example.targets[-1] == IGNORED
    np.testing.assert_array_equal(example.targets[:-1], example.ids[1:])
    assert tokenizer.decode(example.ids[:-1]) == "prices fell"


def test_text_of_a_special_token_is_text(tmp_path, tokenizer) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", {"text": "a <|endoftext|> b"}), tokenizer)
    assert (example.ids == end_of_text(tokenizer)).sum() == 1


def test_only_answers_are_learned(tokenizer) -> None:
    example = dialogue(MESSAGES, tokenizer, "here")
    assert learned_text(example, tokenizer) == "prices fell<|endoftext|>energy fell again<|endoftext|>"
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert tokenizer.decode(example.ids) == whole


def test_prompt_is_tokenized_as_when_answering(tokenizer) -> None:
    example = dialogue(MESSAGES[:3], tokenizer, "here")
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(example.ids[: len(ids)], ids)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "did prices fall", "completion": "prices fell"},
        {"instruction": "did prices", "input": "fall", "output": "prices fell"},
        {"messages": MESSAGES[1:3]},
    ],
)
def test_forms_of_a_dialogue(tmp_path, tokenizer, record) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", record), tokenizer)
    assert learned_text(example, tokenizer) == "prices fell<|endoftext|>"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"title": "x"}', "has no text, messages"),
        ('{"text": 3}', "text is not a string"),
        ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message is the assistant's"),
        ('{"prompt": "<|endoftext|>", "completion": "x"}', "contains <|endoftext|>"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, said) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + said.replace("|", r"\|").replace("+", r"\+")):
        read_examples(path, tokenizer)


def test_empty_file_and_missing_split(tmp_path, tokenizer) -> None:
    with pytest.raises(UserError, match="nothing to learn"):
        read_examples(write(tmp_path / "a.jsonl"), tokenizer)
    with pytest.raises(UserError, match=r"no val\.jsonl"):
        find_split(tmp_path, "val")
    with pytest.raises(UserError, match=r"a\.jsonl is a file: .* --input .*a\.jsonl --out runs/a$"):
        find_split(tmp_path / "a.jsonl", "val")

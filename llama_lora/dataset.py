"""Training text as token ids with targets: documents, and dialogues of which only answers are learned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt.cli import UserError

IGNORED = -100
"""Target of a token after which nothing is learned."""
BATCH = 256  # documents tokenized at a time


@dataclass(frozen=True)
class Example:
    """A document or dialogue of n tokens; `targets` are the next tokens, IGNORED where none is learned."""

    ids: np.ndarray  # (n,) int64
    targets: np.ndarray  # (n,) int64


def find_split(data: Path, split: str) -> Path:
    """DATA/documents/SPLIT.jsonl or DATA/SPLIT.jsonl. Raises UserError where there is neither."""
    for path in (data / "documents" / f"{split}.jsonl", data / f"{split}.jsonl"):
        if path.is_file():
            return path
    if data.exists() and not data.is_dir():
        raise UserError(
            f"--data {data} is a file: name a directory with train.jsonl and val.jsonl, or make one of it: "
            f"python -m data.prepare --source files --input {data} --out runs/{data.stem}"
        )
    if (data / "tape.json").is_file():
        raise UserError(
            f"--data {data} is a tape of numbers, for gpt.train: prepare text in another directory"
        )
    raise UserError(
        f"no {split}.jsonl in {data}: run python -m data.prepare --out {data}, or write one with a JSON "
        "object with text or messages on each line"
    )


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """The examples of a JSON-lines file, in order. Raises UserError with file and line, or if it is empty."""
    examples: list[Example] = []
    texts: list[str] = []
    end = end_of_text(tokenizer)
    for where, record in _records(path):
        if "text" in record:
            texts.append(_string(record, "text", where))
            if len(texts) == BATCH:
                examples += _documents(texts, tokenizer, end)
                texts = []
        else:
            examples += _documents(texts, tokenizer, end)
            texts = []
            examples.append(dialogue(_messages(record, where), tokenizer, where))
    examples += _documents(texts, tokenizer, end)
    if not any((example.targets != IGNORED).any() for example in examples):
        raise UserError(f"{path} holds nothing to learn from")
    return examples


def end_of_text(tokenizer: Any) -> int:
    """The id that ends a document: <|endoftext|> or <|end_of_text|> where the vocabulary has it, else EOS."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[name] for name in ("<|endoftext|>", "<|end_of_text|>") if name in vocabulary]
    if not named and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token")
    return named[0] if named else tokenizer.eos_token_id


def dialogue(messages: list[dict[str, str]], tokenizer: Any, where: str) -> Example:
    """The dialogue in the tokenizer's chat template. What the assistant says is learned, its end included.

    Question and answer are tokenized apart, as they are when the model answers. Raises UserError for a
    message with the text of a special token, and for a template that changes what was said before.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the tokenizer has no chat template; use text instead of messages")
    for message in messages:
        for special in tokenizer.all_special_tokens:
            if special in message["content"]:
                raise UserError(f"{where}: a message contains {special}, which would change who is speaking")
    ids: list[int] = []
    learned: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise UserError(f"{where}: the chat template does not keep earlier messages as they were")
        for text, answer in ((asked[len(done) :], False), (answered[len(asked) :], True)):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            learned += [answer] * len(part)
        done = answered
    if not ids:
        raise UserError(f"{where}: no message is the assistant's")
    return _example(ids, learned)


def _documents(texts: list[str], tokenizer: Any, end: int) -> list[Example]:
    if not texts:
        return []
    # split_special_tokens: the text of a special token is text.
    encoded = tokenizer(texts, split_special_tokens=True)["input_ids"]
    return [_example([*ids, end], [True] * (len(ids) + 1)) for ids in encoded]


def _example(ids: list[int], learned: list[bool]) -> Example:
    array = np.array(ids, dtype=np.int64)
    targets = np.full_like(array, IGNORED)
    targets[:-1] = np.where(np.array(learned)[1:], array[1:], IGNORED)
    return Example(array, targets)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise UserError(f"{where}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object")
            yield where, record


def _messages(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """A dialogue in any of the forms that FinetuneConfig.data names."""
    if "messages" in record:
        messages = record["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good:
            raise UserError(f"{where}: messages must be a list of objects with role and content")
        return messages
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if question in record and answer in record:
            asked = _string(record, question, where)
            if record.get("input"):
                asked += "\n\n" + _string(record, "input", where)
            return [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": _string(record, answer, where)},
            ]
    raise UserError(f"{where}: has no text, messages, prompt + completion, or instruction + output")


def _string(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key} is not a string")
    return record[key]

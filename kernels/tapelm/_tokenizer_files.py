"""Files that hold a tokenizer, recognised by their content, and turned into the content of a tokenizer.json.

    tokenizer.json              Hugging Face: everything
    RANKS.tiktoken              tiktoken, and Llama-3's `tokenizer.model`: tokens only (_rank_files.py)
    encoder.json + vocab.bpe    GPT-2, also called vocab.json + merges.txt: tokens and merges

Every fault found here is a ValueError, to which `Tokenizer.load` adds the name of the file; where there is
nothing, a FileNotFoundError.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapelm._rank_files import config_of_ranks, read_ranks
from tapelm._tokenizer_json import PRE_TOKENIZERS, make_config, require

_END_OF_TEXT = "<|endoftext|>"
_GPT2_NAMES = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}  # tokens: merges
_VOCAB_OF = {merges: vocab for vocab, merges in _GPT2_NAMES.items()}
_IN_DIRECTORY = ("tokenizer.json", *_GPT2_NAMES, "tokenizer.model")
_RANK_SUFFIXES = (".tiktoken", ".model")
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*?(?:[\r\n]|$)")


def tokenizer_file(path: Path) -> Path:
    """The file itself, or that of a directory, a tokenizer.json before others."""
    if not path.exists():
        expected = f"a tokenizer's file, or a directory with one of {', '.join(_IN_DIRECTORY)}"
        raise FileNotFoundError(errno.ENOENT, f"there is nothing here, expected {expected}", str(path))
    if not path.is_dir():
        return path
    found = [path / name for name in _IN_DIRECTORY if (path / name).is_file()]
    require(bool(found), f"{path}: is a directory without any of {', '.join(_IN_DIRECTORY)}")
    return found[0]


def has_rank_suffix(path: Path) -> bool:
    return path.suffix in _RANK_SUFFIXES


def check_arguments(pretokenizer: str | None, specials: Mapping[str, int] | None) -> None:
    """Raise a ValueError that names the argument of `Tokenizer.load` that cannot be used."""
    require(
        pretokenizer is None or pretokenizer in PRE_TOKENIZERS,
        f"pretokenizer must be one of {', '.join(PRE_TOKENIZERS)}, got {pretokenizer!r}",
    )
    for text, index in (specials or {}).items():
        require(
            isinstance(text, str) and text != "" and type(index) is int and index >= 0,
            f"special_tokens must map texts to ids, got {text!r}: {index!r}",
        )


def read_tokenizer_file(
    path: Path, pretokenizer: str | None, specials: Mapping[str, int] | None
) -> dict[str, Any]:
    """The content of a file of any format as that of a tokenizer.json; `Tokenizer.load` has the arguments."""
    content = path.read_bytes()
    looks_like_json = content.lstrip().startswith(b"{")
    if _RANK_LINE.match(content) or (has_rank_suffix(path) and not looks_like_json):
        return config_of_ranks(read_ranks(content), pretokenizer, specials)
    if content.startswith(b"#version") or (path.name in _VOCAB_OF and not looks_like_json):
        vocab = _sibling(path, _VOCAB_OF)
        return _read_gpt2(
            _read_json(vocab.read_bytes(), vocab.name), content, path.name, pretokenizer, specials
        )
    config = _read_json(content)
    if _is_vocabulary(path, config):
        merges = _sibling(path, _GPT2_NAMES)
        return _read_gpt2(config, merges.read_bytes(), merges.name, pretokenizer, specials)
    require(
        pretokenizer is None and specials is None,
        "pretokenizer and special_tokens are for rank files and encoder.json + vocab.bpe: a tokenizer.json "
        "has its own",
    )
    return config


def _read_json(content: bytes, name: str = "") -> Any:
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        known = "neither JSON, nor tiktoken ranks, nor GPT-2 merges"
        raise ValueError(f"{name} is not valid JSON" if name else f"is not valid JSON ({known})") from error


def _is_vocabulary(path: Path, config: Any) -> bool:
    """Whether this is an encoder.json rather than a tokenizer.json, which may be damaged."""
    if not isinstance(config, dict) or isinstance(config.get("model"), dict):
        return False
    return path.name in _GPT2_NAMES or all(type(index) is int for index in config.values())


def _sibling(path: Path, names: Mapping[str, str]) -> Path:
    """The other file of a GPT-2 pair."""
    require(
        path.name in names,
        f"is one of the two files of a GPT-2 tokenizer: it must be called {', '.join(names)} for the "
        "other one to be found",
    )
    other = path.with_name(names[path.name])
    require(other.is_file(), f"needs {other.name} beside it")
    return other


def _read_gpt2(
    vocab: Any, content: bytes, name: str, pretokenizer: str | None, specials: Mapping[str, int] | None
) -> dict[str, Any]:
    """GPT-2's tokens and merges; `name` is that of the file of merges."""
    require(isinstance(vocab, dict), "has no JSON object of tokens and ids")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    merges = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        require(len(pair) == 2 and all(pair), f"{name}, line {number} is no pair of tokens: {line[:60]!r}")
        for token in (*pair, "".join(pair)):
            require(
                token in vocab, f"{name}, line {number} has {token[:60]!r}, which is not in the vocabulary"
            )
        merges.append(pair)
    if specials is None:
        specials = {_END_OF_TEXT: vocab[_END_OF_TEXT]} if _END_OF_TEXT in vocab else {}
    merged = {left + right for left, right in merges}
    lost = [token for token in vocab if len(token) > 1 and token not in merged and token not in specials]
    require(
        not lost,
        f"{name} has no merge for {len(lost)} tokens, such as {(lost or [''])[0][:60]!r}: it is truncated, "
        "or they are special tokens to be named in special_tokens",
    )
    return make_config(vocab, merges, specials, pretokenizer or "gpt2", ignore_merges=False)

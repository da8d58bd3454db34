"""Byte-level byte-pair encoding: the Python face of the C++ tokenizer (csrc/text/bpe.h).

Training gives the merges, and encoding the ids, of Hugging Face `tokenizers` (BpeTrainer with the ByteLevel
alphabet, BPE model) and of tiktoken; files are Hugging Face's `tokenizer.json`, tiktoken's ranks and GPT-2's
pair of files.

Texts are str or bytes, and `decode_bytes(encode(x))` gives the bytes of x always:
- A str is encoded as UTF-8; one with a lone surrogate raises ValueError, as it has no UTF-8.
- Bytes that are not UTF-8 are encoded as they are: each byte outside a valid character (overlong forms,
  surrogates and values above U+10FFFF included) counts as one character that is no letter, number or white
  space. Peers cannot be followed here: tokenizers take no bytes, tiktoken's result is unspecified.
- The text of a special token raises ValueError unless `allow_special`, so that input cannot forge one; among
  several that begin at a place the longest counts. Nothing is added around a text.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tapelm import _text
from tapelm._blocks import Encoding
from tapelm._rank_files import ranks_of
from tapelm._tokenizer_files import check_arguments, has_rank_suffix, read_tokenizer_file, tokenizer_file
from tapelm._tokenizer_json import CHARACTER_OF_BYTE, new_config
from tapelm._tokenizer_reader import read_config
from tapelm.encode_files import encode_files
from tapelm.shards import check_integers


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: of the many small objects of a vocabulary, each few hundred set it off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Tokenizer:
    """Byte-level BPE tokenizer; make one with `Tokenizer.train` or `Tokenizer.load`.

    Attributes:
        vocab_size: number of ids, special tokens included; ids are 0 .. vocab_size - 1.
        special_tokens: id of every special token by its text.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Build from the content of a tokenizer.json; raises ValueError naming what is wrong with it."""
        file = read_config(config)
        self._config = config
        self._bpe = _text.Bpe(
            file.tokens, file.merges, list(file.specials.values()), file.pre_tokenizer, file.ignore_merges
        )
        self._sha256 = file.sha256()
        self.vocab_size = len(file.tokens)
        self.special_tokens = file.specials

    @classmethod
    def train(
        cls,
        inputs: Iterable[str | bytes],
        vocab_size: int,
        special_tokens: Sequence[str] = ("<|endoftext|>",),
        *,
        min_frequency: int = 0,
    ) -> Tokenizer:
        """Learn a vocabulary of at most `vocab_size` ids from texts, split as GPT-2 does.

        Ids are those of Hugging Face's BpeTrainer: special tokens first, then the 256 bytes, then the merges,
        ties broken towards lower ids. The vocabulary is smaller where no pair is left that occurs
        `min_frequency` times. Memory is bounded by the number of distinct words. Source: Sennrich et al.
        2016; Radford et al. 2019 (bytes).

        Raises:
            TypeError: a number that is no integer.
            ValueError: no text at all, `vocab_size` below 256 + special tokens, unusable special tokens.
        """
        if isinstance(inputs, str | bytes):
            raise TypeError("inputs must be an iterable of texts: pass [text] for a single text")
        if isinstance(special_tokens, str):
            raise TypeError("special_tokens must be a sequence of str: pass [token] for a single one")
        specials = list(special_tokens)
        if len(set(specials)) != len(specials) or "" in specials:
            raise ValueError(f"special_tokens must be distinct and not empty, got {specials}")
        check_integers(vocab_size=vocab_size, min_frequency=min_frequency)
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"vocab_size must be at least {256 + len(specials)} (256 bytes and {len(specials)} special "
                f"tokens), got {vocab_size}"
            )
        if min_frequency < 0:
            raise ValueError(f"min_frequency must not be negative, got {min_frequency}")
        trainer = _text.BpeTrainer(_text.GPT2)
        for text in inputs:
            trainer.feed(text)
        if trainer.words == 0:
            raise ValueError("inputs contain no text to train on")
        byte_ids = np.empty(256, dtype=np.int64)
        byte_ids[np.argsort(CHARACTER_OF_BYTE)] = np.arange(len(specials), len(specials) + 256)
        rows = trainer.train(
            vocab_size, byte_ids.tolist(), [token.encode() for token in specials], min_frequency
        )
        return cls(new_config(specials, byte_ids.tolist(), rows.tolist()))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        pretokenizer: str | None = None,
        special_tokens: Mapping[str, int] | None = None,
    ) -> Tokenizer:
        """Read a file of one of these formats, told apart by content, or a directory that holds one.

        - Hugging Face `tokenizer.json`: byte-level BPE, splitting of GPT-2, Llama-3, o200k or SmolLM2.
        - tiktoken ranks (`.tiktoken`, Llama-3's `tokenizer.model`): ids are those of tiktoken. The file has
          tokens only, so pass `pretokenizer`; a file of 128,000 ranks is Llama-3, with its special tokens.
          Ids that `special_tokens` leave free above the ranks become the special tokens <|reserved_ID|>.
        - GPT-2 `encoder.json` + `vocab.bpe`, or `vocab.json` + `merges.txt`: either one, the other beside it.

        Args:
            pretokenizer: how text is split, "gpt2", "llama3", "o200k" or "digits" (SmolLM2), where the file
                does not say it; "gpt2" for the pair of files.
            special_tokens: ids of special tokens by their text, where the file does not say it; for the pair
                of files <|endoftext|>, where it is in the vocabulary, for ranks none.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: the file is broken or of another kind, or an argument is missing or out of place; the
                message names the file and the fault.
        """
        check_arguments(pretokenizer, special_tokens)
        file = tokenizer_file(Path(path))
        try:
            with _collector_paused():
                return cls(read_tokenizer_file(file, pretokenizer, special_tokens))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Hugging Face `tokenizer.json`, or tiktoken ranks where `path` ends in .tiktoken or .model.

        Ranks leave out the splitting and the special tokens: `load` needs them again. Folders are made; an
        existing file is replaced only by a complete one.

        Raises:
            ValueError: tiktoken's rule would merge this vocabulary in another way.
        """
        target = Path(path)
        if has_rank_suffix(target):
            try:
                content = ranks_of(read_config(self._config))
            except ValueError as error:
                raise ValueError(f"{target}: {error}") from error
        else:
            content = json.dumps(self._config, ensure_ascii=False, indent=1).encode()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> np.ndarray:
        """Ids of a text, uint32 of shape (n,). No token is added around it.

        Raises:
            ValueError: a str holds a lone surrogate, or the text holds that of a special token and
                `allow_special` is False; with True it becomes the one id.
        """
        return self._bpe.encode(text, allow_special)

    def encode_batch(
        self, texts: Iterable[str | bytes], *, allow_special: bool = False, threads: int = 0
    ) -> list[np.ndarray]:
        """Ids of every text, as `encode` gives them, on `threads` threads (0: one per core).

        The arrays are views of one flat array.
        """
        if isinstance(texts, str | bytes):
            raise TypeError("texts must be an iterable of texts: use encode for a single one")
        if threads < 0:
            raise ValueError(f"threads must not be negative, got {threads}")
        ids, offsets = self._bpe.encode_batch(tuple(texts), allow_special, threads)
        return [ids[begin:end] for begin, end in pairwise(offsets.tolist())]

    def encode_files(
        self,
        paths: Iterable[str | os.PathLike[str]],
        out_dir: str | os.PathLike[str],
        *,
        end_of_text: str = "<|endoftext|>",
        shard_tokens: int = 2**26,
    ) -> dict[str, Any]:
        """Encode files into a directory of token shards and return its manifest (see `tapelm.write_shards`).

        A `.jsonl` file holds one document per line in its field "text"; any other file is one UTF-8 document,
        an empty one a document of nothing but its end.
        Files are streamed, so that memory stays at some tens of megabytes (a line, or text without white
        space, is held whole), and encoded on all cores. Until everything is done the shards are in
        `out_dir`.partial: killed at any time, the same call goes on after the last finished shard, of
        `shard_tokens` tokens; with fewer it starts anew.

        Raises:
            TypeError: `shard_tokens` is no integer.
            ValueError: a file is not UTF-8, not JSONL with "text", or holds a special token (the message
                names file and line), none of them has any text, one changed meanwhile, or another process is
                encoding to `out_dir`. What was encoded is removed, as it is of files that must change.
        """
        if end_of_text not in self.special_tokens:
            raise ValueError(
                f"end_of_text {end_of_text!r} is not among the special tokens {list(self.special_tokens)}"
            )
        if isinstance(paths, str | os.PathLike):
            raise TypeError("paths must be an iterable of paths: pass [path] for a single file")
        encoding = Encoding(
            self._bpe,
            vocab_size=self.vocab_size,
            end_of_text=self.special_tokens[end_of_text],
            specials=[token.encode() for token in self.special_tokens],
            tokenizer_sha256=self._sha256,
        )
        return encode_files(encoding, [Path(path) for path in paths], out_dir, shard_tokens)

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """Bytes of ids, special tokens as their text; raises ValueError on an id outside the vocabulary."""
        array = np.asarray(ids)
        if array.size == 0:
            return b""
        if array.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got {array.dtype}")
        if array.min() < 0 or array.max() >= self.vocab_size:
            wrong = array[(array < 0) | (array >= self.vocab_size)].flat[0]
            raise ValueError(f"id {wrong} is outside the vocabulary of {self.vocab_size} tokens")
        return self._bpe.decode(np.ascontiguousarray(array, dtype=np.uint32))

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

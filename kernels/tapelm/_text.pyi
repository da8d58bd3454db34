from collections.abc import Sequence

import numpy as np

TORCH_VERSION: str
GPT2: int
LLAMA3: int
GPT2_DIGITS: int
O200K: int
SHUFFLED: int
SEQUENTIAL: int
PACKED: int

class Bpe:
    def __init__(
        self,
        tokens: Sequence[bytes],
        merges: np.ndarray,
        specials: Sequence[int],
        pretokenizer: int,
        ignore_merges: bool,
    ) -> None: ...
    def encode(self, text: str | bytes, allow_special: bool) -> np.ndarray: ...
    def encode_batch(
        self, texts: tuple[str | bytes, ...], allow_special: bool, threads: int
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def decode(self, ids: np.ndarray) -> bytes: ...

class BpeTrainer:
    def __init__(self, pretokenizer: int) -> None: ...
    @property
    def words(self) -> int: ...
    def feed(self, text: str | bytes) -> None: ...
    def train(
        self, vocab_size: int, byte_ids: Sequence[int], reserved: Sequence[bytes], min_frequency: int
    ) -> np.ndarray: ...

class ShardHeader:
    token_bytes: int
    tokens: int
    documents: int
    vocab_size: int
    end_of_text: int

class Loader:
    def __init__(
        self,
        paths: Sequence[str],
        end_of_text: int,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int,
        world_size: int,
        order: int = ...,
        rows: bool = False,
    ) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def headers(self) -> list[ShardHeader]: ...
    def window_indices(self, step: int) -> list[int]: ...
    def next(self, step: int) -> tuple[np.ndarray, ...]: ...

def merges_of_ranks(tokens: Sequence[bytes]) -> np.ndarray: ...
def word_lengths(text: str | bytes, pretokenizer: int) -> list[int]: ...
def start_writing(descriptor: int) -> None: ...
def shard_header(
    token_bytes: int, tokens: int, documents: int, vocab_size: int, end_of_text: int
) -> bytes: ...
def text_field(line: bytes) -> str: ...
def safe_cut(text: bytes, specials: Sequence[bytes]) -> int: ...
def encode_lines(
    bpe: Bpe, lines: bytes | memoryview, path: str, first_line: int, end_of_text: int, token_bytes: int
) -> tuple[np.ndarray, np.ndarray]: ...
def encode_pieces(
    bpe: Bpe,
    pieces: Sequence[bytes],
    places: Sequence[str],
    ends: Sequence[bool],
    continued: bool,
    end_of_text: int,
    token_bytes: int,
) -> tuple[np.ndarray, np.ndarray]: ...

"""Token shards and the batch loader: contents, order, coverage, resuming, and what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tapelm import _text
from tapelm._shard_writer import ShardWriter
from tapelm.loader import Batch, TokenLoader
from tapelm.shards import verify_shards, write_shards

VOCAB, END = 1000, 999


def make_documents(count: int = 40, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, END, generator.integers(0, 90), dtype=np.uint32) for _ in range(count)]


def sequence_of(documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.append(ids, np.uint32(END)) for ids in documents])


def write(path: Path, documents: list[np.ndarray] | None = None, shard_tokens: int = 100) -> dict:
    documents = make_documents() if documents is None else documents
    return write_shards(documents, path, vocab_size=VOCAB, end_of_text=END, shard_tokens=shard_tokens)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def take(loader: TokenLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("vocab_size", "width"), [(1000, 2), (65536, 2), (65537, 4)])
def test_shard_files(tmp_path: Path, vocab_size: int, width: int) -> None:
    documents = make_documents()
    documents[3] = np.append(documents[3], np.uint32(END))  # already ended: not ended twice
    manifest = write_shards(
        iter(documents), tmp_path / "x", vocab_size=vocab_size, end_of_text=END, shard_tokens=128
    )
    expected = sequence_of(make_documents())
    assert manifest == json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest == verify_shards(tmp_path / "x")
    assert manifest["tokens"] == expected.size and manifest["documents"] == 40
    assert manifest["vocab_size"] == vocab_size and manifest["end_of_text"] == END
    tokens, starts, seen = [], [], 0
    for number, entry in enumerate(manifest["shards"]):
        assert entry["file"] == f"shard-{number:05d}.bin"
        content = (tmp_path / "x" / entry["file"]).read_bytes()
        count, documents_here = np.frombuffer(content, np.uint64, 2, offset=16).tolist()
        assert np.frombuffer(content, np.uint32, 1, offset=12) == width
        assert count == entry["tokens"] == min(128, expected.size - seen)
        tokens.append(np.frombuffer(content, f"u{width}", count, offset=64))
        starts.append(np.frombuffer(content[len(content) - 8 * documents_here :], np.uint64) + seen)
        seen += count
    assert np.array_equal(np.concatenate(tokens), expected)
    ends = np.flatnonzero(expected == END) + 1
    assert np.array_equal(np.concatenate(starts), np.concatenate([[0], ends[:-1]]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 257, 1000])
def test_order_is_a_bijection_that_changes(tmp_path: Path, size: int) -> None:
    write(tmp_path / "x", [np.arange(size - 1, dtype=np.uint32) % END], shard_tokens=2**20)
    write(tmp_path / "y", [np.arange(size, dtype=np.uint32) % END], shard_tokens=2**20)
    path = str(tmp_path / "y" / "shard-00000.bin")
    orders = []
    for seed in (0, 1, 2**64 - 1):
        loader = _text.Loader([path], END, 1, 1, seed, 0, 1)
        for epoch in range(3):
            order = [loader.window_indices(epoch * size + i)[0] for i in range(size)]
            assert sorted(order) == list(range(size))
            orders.append(tuple(order))
    if size >= 100:
        assert len(set(orders)) == 9
        assert all(sum(a == b for a, b in enumerate(order)) < 10 for order in orders), "hardly shuffled"


def test_batches_are_windows_of_the_sequence(shards: Path) -> None:
    """Windows of 64 tokens span the shards of 100; every one comes once, with targets one token later."""
    expected = sequence_of(make_documents()).astype(np.int64)
    loader = TokenLoader(shards, 1, 64, seed=3)
    assert len(loader) == loader.windows == (expected.size - 1) // 64
    windows = {expected[i * 64 : i * 64 + 65].tobytes() for i in range(loader.windows)}
    for batch in take(loader, len(loader)):
        assert batch.inputs.shape == batch.targets.shape == batch.document_ids.shape == (1, 64)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.document_ids.dtype == torch.int32
        window = np.append(batch.inputs[0, :1].numpy(), batch.targets[0].numpy())
        assert torch.equal(batch.inputs[0, 1:], batch.targets[0, :-1])
        windows.remove(window.tobytes())
        ended = np.cumsum(window[:-1] == END)
        assert batch.document_ids[0].tolist() == [0, *ended[:-1].tolist()]
    assert not windows and loader.epoch == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_cover_every_window_once(shards: Path, world_size: int, batch_size: int) -> None:
    ranks = [
        TokenLoader(shards, batch_size, 16, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    windows, step = ranks[0].windows, batch_size * world_size
    assert all(len(loader) == windows // step for loader in ranks)
    left_out = []
    for _ in range(2):
        seen = Counter(
            tuple(row.tolist())
            for loader in ranks
            for batch in take(loader, len(loader))
            for row in batch.targets
        )
        assert sum(seen.values()) == windows // step * step
        assert set(seen.values()) == {1}
        expected = sequence_of(make_documents())
        every = {tuple(expected[i * 16 + 1 : i * 16 + 17].tolist()) for i in range(windows)}
        assert set(seen) <= every
        left_out.append(frozenset(every - set(seen)))
        assert len(left_out[-1]) == windows % step
    if windows % step > 2:
        assert left_out[0] != left_out[1], "the windows left out should change"


def test_world_size_does_not_change_the_global_batch(shards: Path) -> None:
    whole = TokenLoader(shards, 6, 16, seed=9)
    parts = [TokenLoader(shards, 2, 16, seed=9, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(2 * len(whole)):
        together = torch.cat([next(part).inputs for part in parts])
        assert torch.equal(together, next(whole).inputs)


def test_seed_and_epoch_change_the_order(shards: Path) -> None:
    first, again, other = (TokenLoader(shards, 2, 16, seed=seed) for seed in (1, 1, 2))
    epoch = take(first, len(first))
    assert_same(epoch, take(again, len(again)))
    assert not torch.equal(epoch[0].inputs, next(other).inputs)
    assert first.epoch == 1
    assert not torch.equal(epoch[0].inputs, next(first).inputs)


@pytest.mark.parametrize("consumed", [0, 1, 7, 23, 60])
def test_resuming_is_exact(shards: Path, consumed: int) -> None:
    loader = TokenLoader(shards, 3, 16, seed=4)
    take(loader, consumed)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = TokenLoader(shards, 3, 16, seed=4)
    resumed.load_state_dict(state)
    assert resumed.epoch == loader.epoch
    assert_same(take(resumed, 30), take(loader, 30))


def test_a_far_position_is_reached_at_once(shards: Path) -> None:
    loader = TokenLoader(shards, 3, 16)
    loader.load_state_dict({**loader.state_dict(), "step": 10**15})
    assert next(loader).inputs.shape == (3, 16)
    assert loader.epoch == (10**15 + 1) // len(loader)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fingerprint": "0" * 64}, "other shards"),
        ({"seed": 5}, "other seed: it has 5, this loader has 0"),
        ({"batch_size": 4}, "other batch_size"),
        ({"seq_len": 8}, "other seq_len"),
        ({"world_size": 2}, "other world_size"),
        ({"step": -1}, "no valid step"),
        ({"step": "7"}, "no valid step"),
    ],
)
def test_foreign_states_are_refused(shards: Path, change: dict, match: str) -> None:
    loader = TokenLoader(shards, 3, 16)
    next(loader)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=match):
        loader.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="state is not what state_dict of a TokenLoader gives"):
        loader.load_state_dict({})
    assert loader.state_dict() == before


def test_rewritten_shards_have_another_fingerprint(shards: Path) -> None:
    state = TokenLoader(shards, 3, 16).state_dict()
    write(shards, make_documents(seed=1))
    with pytest.raises(ValueError, match="fingerprint"):
        TokenLoader(shards, 3, 16).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"seq_len": -1}, "seq_len must be positive"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"seq_len": 100_000}, r"corpus of \d+ tokens is smaller than one block of 100001"),
        ({"batch_size": 10_000}, r"fewer than batch_size x world_size = 10000"),
    ],
)
def test_unusable_arguments(shards: Path, arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenLoader(shards, **{"batch_size": 2, "seq_len": 16, **arguments})


@pytest.mark.parametrize("name", ["batch_size", "seq_len", "rank", "world_size", "seed"])
@pytest.mark.parametrize("value", [16.0, True, "16", None])
def test_numbers_are_integers(shards: Path, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
        TokenLoader(shards, **{"batch_size": 2, "seq_len": 16, name: value})


def test_numpy_integers_are_integers(shards: Path) -> None:
    loader = TokenLoader(shards, np.int64(2), np.int32(16), seed=np.uint8(3))  # type: ignore[arg-type]
    assert json.loads(json.dumps(loader.state_dict())) == TokenLoader(shards, 2, 16, seed=3).state_dict()


def test_smallest_corpus(tmp_path: Path) -> None:
    write(tmp_path / "x", [np.arange(16, dtype=np.uint32)])
    loader = TokenLoader(tmp_path / "x", 1, 16)
    assert len(loader) == 1 and next(loader).targets[0, -1] == END
    with pytest.raises(ValueError, match="corpus of 17 tokens is smaller than one block of 18"):
        TokenLoader(tmp_path / "x", 1, 17)


@pytest.mark.parametrize("keep", [0, 10, 63, 64, 200, -1])
def test_truncated_shards_are_named(shards: Path, keep: int) -> None:
    path = shards / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-00001\.bin is truncated"):
        TokenLoader(shards, 2, 16)
    with pytest.raises(ValueError, match=r"shard-00001\.bin is damaged"):
        verify_shards(shards)


@pytest.mark.parametrize("offset", range(0, 40, 4))
def test_damaged_headers_are_named(shards: Path, offset: int) -> None:
    path = shards / "shard-00002.bin"
    content = bytearray(path.read_bytes())
    content[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002\.bin"):
        TokenLoader(shards, 2, 16)


def test_a_flipped_bit_is_found(shards: Path) -> None:
    path = shards / "shard-00002.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002\.bin is damaged"):
        verify_shards(shards)


def test_missing_files_are_named(shards: Path, tmp_path: Path) -> None:
    (shards / "shard-00003.bin").unlink()
    with pytest.raises(ValueError, match=r"shard-00003\.bin cannot be opened"):
        TokenLoader(shards, 2, 16)
    with pytest.raises(ValueError, match=r"shard-00003\.bin is missing"):
        verify_shards(shards)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        TokenLoader(tmp_path / "nowhere", 2, 16)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"format": "tapelm-shards"}',
        '{"format": "other", "version": 1}',
        "\x00",
    ],
)
def test_broken_manifests_are_named(shards: Path, content: str) -> None:
    (shards / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is not"):
        TokenLoader(shards, 2, 16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(tokens=m["tokens"] + 1), "totals"),
        (lambda m: m.update(documents=0), "totals"),
        (lambda m: m.update(dtype="uint32"), "is stored as uint16"),
        (lambda m: m.update(vocab_size=-1), "is not a manifest"),
        (lambda m: m.update(vocab_size=2**70), "is not a manifest"),
        (lambda m: m.update(shards=[]), "is not a manifest"),
        (lambda m: m["shards"].reverse(), "is not a manifest"),
        (lambda m: m["shards"].pop(), "totals"),
        (lambda m: m["shards"][0].update(tokens=-1), "is not a manifest"),
        (lambda m: m["shards"][0].update(file="\ud800"), "is not a manifest"),
    ],
)
def test_damaged_manifests_are_found(
    shards: Path, change: Callable[[dict[str, Any]], object], match: str
) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    change(manifest)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    for use in (verify_shards, lambda directory: TokenLoader(directory, 2, 16)):
        with pytest.raises(ValueError, match=match):
            use(shards)


def test_a_manifest_cannot_name_files_elsewhere(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../secret.bin"
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is not a manifest"):
        TokenLoader(shards, 2, 16)


def test_shards_of_another_manifest_are_refused(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["end_of_text"] = 5
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not belong to its manifest"):
        TokenLoader(shards, 2, 16)


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        ([], "nothing to write"),
        ([np.array([1, VOCAB])], "document 0 has the id 1000, outside the vocabulary"),
        ([np.array([1]), np.array([-1, 3])], "document 1 has the id -1"),
        ([np.array([1, END, 2])], "end_of_text"),
        ([np.array([0.5])], "1-D integer array"),
        ([np.zeros((2, 2), dtype=np.int64)], "1-D integer array"),
    ],
)
def test_bad_documents_leave_old_shards(shards: Path, documents: list[np.ndarray], match: str) -> None:
    before = verify_shards(shards)
    with pytest.raises(ValueError, match=match):
        write(shards, documents)
    assert verify_shards(shards) == before
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


def test_unusable_shard_settings(tmp_path: Path) -> None:
    for settings, match in (
        ({"vocab_size": 0, "end_of_text": 0}, "vocab_size"),
        ({"vocab_size": 10, "end_of_text": 10}, "end_of_text"),
        ({"vocab_size": 10, "end_of_text": 1, "shard_tokens": 0}, "shard_tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            write_shards([np.array([1])], tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_shard_directories_names_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no manifest\.json$"):
        verify_shards(tmp_path)
    write(tmp_path / "train")
    with pytest.raises(ValueError, match=r"manifest\.json; shards are in \S+/train$"):
        verify_shards(tmp_path)
    write(tmp_path / "val")
    with pytest.raises(ValueError, match=r"; shards are in \S+/train and \S+/val$"):
        verify_shards(tmp_path)


def test_other_directories_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no shard directory"):
        write(tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "notes" / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(ValueError, match="no shard directory"):
        write(tmp_path / "notes")
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == verify_shards(tmp_path / "empty")
    (tmp_path / "empty" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which is no shard"):
        write(tmp_path / "empty")
    assert (tmp_path / "empty" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_source_leaves_old_shards(shards: Path) -> None:
    before = verify_shards(shards)

    def documents():
        yield from make_documents(seed=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(documents(), shards, vocab_size=VOCAB, end_of_text=END, shard_tokens=100)
    assert verify_shards(shards) == before
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


def test_a_failed_rename_puts_old_shards_back(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, rename = verify_shards(shards), Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="No space left"):
        write(shards, make_documents(seed=2))
    assert verify_shards(shards) == before
    assert [path.name for path in shards.parent.iterdir()] == ["shards"]


def test_old_shards_that_cannot_be_removed_are_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        if ".old-" in path.name:
            raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match=r"shards\.old-.*, the data before, cannot be removed"):
        manifest = write(shards, make_documents(seed=2))
    assert verify_shards(shards) == manifest


AFTER_MAIN = """
import sys, threading
import numpy as np
from tapelm import write_shards

main = threading.current_thread()

def documents():
    yield np.arange(10)
    main.join()  # what is written now is written while the interpreter shuts down
    yield from (np.arange(10) for _ in range(400_000))

def write():
    write_shards(documents(), sys.argv[1], vocab_size=100, end_of_text=0, shard_tokens=3_000_000)

threading.Thread(target=write).start()
"""


def test_a_thread_that_outlives_the_main_program_can_write(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", AFTER_MAIN.replace("arange(10)", "arange(1, 10)"), tmp_path / "shards"]
    subprocess.run(arguments, check=True, timeout=100)
    assert verify_shards(tmp_path / "shards")["documents"] == 400_001


def test_a_closed_writer_takes_nothing_more(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, VOCAB, END, 100)
    ids, starts = np.ones(30, dtype=np.uint16), np.zeros(1, dtype=np.uint64)
    writer.add(ids, starts)
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.add(ids, starts)
    with pytest.raises(ValueError, match="closed"):
        writer.write_manifest()


FULL_DISK = """
import resource, sys
import numpy as np
from tapelm.shards import write_shards
from tapelm.tokenizer import Tokenizer

tokenizer = Tokenizer.train(["the disk is full"], 270)


def write_new_shards():
    documents = (np.full(5000, 7) for _ in range(20))
    write_shards(documents, sys.argv[1] + "/shards", vocab_size=1000, end_of_text=999, shard_tokens=50_000)


for limit in (0, 50, 30_000, 100_060):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for action in [write_new_shards, lambda: tokenizer.save(sys.argv[1] + "/tokenizer.json")]:
        try:
            action()
        except OSError as error:
            print(limit, error.strerror)
        if limit > 1000:
            break
"""


def test_a_full_disk_leaves_old_files(shards: Path) -> None:
    """The limits stop writing at the header, among the tokens, and among the document starts."""
    before = verify_shards(shards)
    (shards.parent / "tokenizer.json").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(shards.parent)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(_text.__file__).parents[1])},
        timeout=300,
    )
    assert done.stderr == "" and done.returncode == 0
    limits = (0, 0, 50, 50, 30_000, 100_060)
    assert done.stdout == "".join(f"{limit} File too large\n" for limit in limits)
    assert verify_shards(shards) == before
    assert (shards.parent / "tokenizer.json").read_text() == "old"
    assert sorted(path.name for path in shards.parent.iterdir()) == ["shards", "tokenizer.json"]

"""The loader's orders and its prefetch thread: packing, coverage, exact positions, faults, forks, opening."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tapelm import _text
from tapelm.loader import ORDERS, Batch, TokenLoader
from tapelm.shards import write_shards

VOCAB, END = 1000, 999
SMALL = [90, 15, 0, 16, 31, 33, 47, 1, 2, 14, 200, 17, 15, 15, 64]


def documents_of(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Documents without their END; no two are alike as long as they have three tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, END, length, dtype=np.uint32) for length in lengths]


def write(path: Path, documents: list[np.ndarray], vocab_size: int = VOCAB, shard_tokens: int = 100) -> Path:
    write_shards(documents, path, vocab_size=vocab_size, end_of_text=END, shard_tokens=shard_tokens)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    lengths = random.Random(0).choices(range(90), k=300)
    return write(tmp_path / "shards", documents_of(lengths))


def rows(loader: TokenLoader, steps: int | None = None) -> list[tuple[list[int], list[int], list[int]]]:
    """(inputs, targets, document_ids) of every row of the next epoch."""
    batches = (next(loader) for _ in range(len(loader) if steps is None else steps))
    return [tuple(x.tolist() for x in row) for batch in batches for row in zip(*batch, strict=True)]


def exits_in_silence(code: str, shards: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, str(shards)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(_text.__file__).parents[1])},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")


def pieces_of(row: tuple[list[int], list[int], list[int]]) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every document of a packed row, padding checked and left out."""
    inputs, targets, ids = row
    assert ids[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(ids))
    found = []
    for document in range(ids[-1] + 1):
        at = [t for t, of in enumerate(ids) if of == document]
        x, y = [inputs[t] for t in at], [targets[t] for t in at]
        if set(y) == {-100} and len(x) > 1:
            assert document == ids[-1] and set(x) == {END}
            continue
        found.append((x, y))
    return found


def best_fit_decreasing(lengths: list[int], seq_len: int) -> int:
    """Windows that a plain best-fit decreasing needs for documents of these lengths, END included."""
    rooms: list[int] = []
    for length in sorted((n % seq_len for n in lengths), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if length and fitting:
            rooms[rooms.index(min(fitting))] -= length
        elif length:
            rooms.append(seq_len - length)
    return len(rooms) + sum(n // seq_len for n in lengths)


@pytest.mark.parametrize("vocab_size", [VOCAB, 70_000])
@pytest.mark.parametrize("seq_len", [16, 17, 64, 300])
def test_packing_loses_and_repeats_nothing(tmp_path: Path, seq_len: int, vocab_size: int) -> None:
    documents = documents_of([3 + n for n in SMALL])
    loader = TokenLoader(write(tmp_path / "x", documents, vocab_size), 1, seq_len, order="packed")
    assert loader.windows == len(loader) == best_fit_decreasing([4 + n for n in SMALL], seq_len)
    expected = Counter()
    for ids in documents:
        x = [*ids.tolist(), END]
        y = [*x[1:], -100]
        for at in range(0, len(x), seq_len):
            expected[tuple(x[at : at + seq_len]), tuple(y[at : at + seq_len])] += 1
    found = Counter()
    for row in rows(loader):
        assert len(row[0]) == seq_len
        found.update((tuple(x), tuple(y)) for x, y in pieces_of(row))
    # A piece that is END alone looks like padding.
    lonely = ((END,), (-100,))
    assert +(found - Counter({lonely: found[lonely]})) == +(expected - Counter({lonely: expected[lonely]}))


def test_packed_rows_are_dense(shards: Path) -> None:
    loader = TokenLoader(shards, 1, 256, order="packed")
    ignored = sum(y == -100 for _, targets, _ in rows(loader) for y in targets)
    assert ignored - 300 < 0.02 * loader.tokens, "documents end 300 times; the rest is padding"


def test_packing_in_groups(tmp_path: Path) -> None:
    """More documents than a group holds: every token still comes once, and epochs differ."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(1, 6, 70_000)
    documents = np.split(generator.integers(0, END, lengths.sum(), dtype=np.uint32), np.cumsum(lengths)[:-1])
    write(tmp_path / "x", documents, shard_tokens=30_000)
    loader = TokenLoader(tmp_path / "x", 16, 64, order="packed")
    kept = len(loader) * 16
    windows = [_indices(loader, epoch) for epoch in range(2)]
    for order in windows:
        assert len(set(order)) == kept and max(order) < loader.windows
    assert windows[0] != windows[1]
    starts = Counter(tuple(ids[:2].tolist()) for ids in documents)
    every = _text.Loader(_paths(tmp_path / "x"), END, 1, 64, 0, 0, 1, _text.PACKED)
    tokens = Counter()
    for step in range(every.windows):
        inputs, targets, ids = (array[0] for array in every.next(step))
        real = ids < (ids[-1] if targets[-1] == -100 and inputs[-1] == END else ids[-1] + 1)
        tokens.update(inputs[real | (targets != -100)].tolist())
    expected = Counter(np.concatenate(documents).tolist())
    assert starts and {k: v for k, v in tokens.items() if k != END} == expected


def _paths(directory: Path) -> list[str]:
    return sorted(map(str, directory.glob("*.bin")))


def _indices(loader: TokenLoader, epoch: int) -> list[int]:
    steps = range(epoch * len(loader), (epoch + 1) * len(loader))
    return [index for step in steps for index in loader._loader.window_indices(step)]


def test_sequential_windows_come_as_they_are(shards: Path) -> None:
    loader, other_seed = (TokenLoader(shards, 3, 16, seed=seed, order="sequential") for seed in (0, 7))
    epoch = rows(loader)
    stored = [np.fromfile(path, np.uint16)[32:] for path in _paths(shards)]
    counts = [entry["tokens"] for entry in json.loads((shards / "manifest.json").read_text())["shards"]]
    sequence = np.concatenate([ids[:n] for ids, n in zip(stored, counts, strict=True)]).tolist()
    for w, (inputs, targets, _) in enumerate(epoch):
        assert inputs == sequence[16 * w : 16 * w + 16] and targets == sequence[16 * w + 1 : 16 * w + 17]
    assert epoch == rows(other_seed) and epoch == rows(loader)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_cover_every_window_once(shards: Path, order: str, world_size: int) -> None:
    one = TokenLoader(shards, 1, 32, order=order)
    parts = [
        TokenLoader(shards, 1, 32, order=order, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for epoch in range(2):
        seen = sorted(index for part in parts for index in _indices(part, epoch))
        assert len(seen) == len(set(seen)) == one.windows // world_size * world_size
        assert set(seen) <= set(range(one.windows))
    for _ in range(2 * len(parts[0])):  # the ranks of a step are the windows of one process in turn
        together = [next(part) for part in parts]
        for batch in together:
            if len(one) % world_size == 0:
                assert all(torch.equal(a, b) for a, b in zip(batch, next(one), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_positions_are_exact_whatever_is_prefetched(shards: Path, order: str) -> None:
    """Consumed batches count, not prepared ones; a jump gives the batches of that position."""
    loader = TokenLoader(shards, 3, 16, seed=4, order=order)
    straight = [next(loader) for _ in range(60)]
    assert loader.state_dict()["step"] == 60
    jumping = TokenLoader(shards, 3, 16, seed=4, order=order)
    generator = random.Random(1)
    for _ in range(100):
        step = generator.randrange(55)
        jumping.load_state_dict(json.loads(json.dumps({**jumping.state_dict(), "step": step})))
        for batch in straight[step : step + generator.randrange(6)]:
            assert all(torch.equal(a, b) for a, b in zip(batch, next(jumping), strict=True))
    far = {**loader.state_dict(), "step": 10**15}
    loader.load_state_dict(far)
    assert next(loader).inputs.shape == (3, 16)
    with pytest.raises(ValueError, match="other order"):
        loader.load_state_dict({**far, "order": "other"})


def test_states_saved_before_there_were_orders(shards: Path) -> None:
    loader = TokenLoader(shards, 3, 16)
    state = {name: value for name, value in loader.state_dict().items() if name != "order"}
    loader.load_state_dict({**state, "step": 5})
    with pytest.raises(ValueError, match="other order: it has shuffled"):
        TokenLoader(shards, 3, 16, order="packed").load_state_dict(state)


def test_the_shuffled_order_is_that_of_earlier_versions(tmp_path: Path) -> None:
    documents = [np.arange(n, dtype=np.uint32) * 7 % END for n in range(200)]
    loader = TokenLoader(write(tmp_path / "x", documents, shard_tokens=1000), 4, 32, seed=11)
    digest = hashlib.sha256()
    for _ in range(300):
        for tensor in next(loader):
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "ded213eea21a582f76d24802f9e5b06044f90e04527005c4954ab58c500b9eab"


def test_batches_stay_what_they_are(shards: Path) -> None:
    """A batch that is kept is not overwritten by later ones, also when the loader is gone."""
    loader = TokenLoader(shards, 2, 16)
    kept = [next(loader) for _ in range(40)]
    copies = [Batch(*(tensor.clone() for tensor in batch)) for batch in kept]
    for _ in range(40):
        next(loader)
    del loader
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))
        assert all(tensor.is_contiguous() for tensor in batch)
        batch.inputs.zero_()


def test_loaders_end_their_threads(shards: Path) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    next(TokenLoader(shards, 2, 16))
    before = threads()
    loaders = [TokenLoader(shards, 2, 16) for _ in range(20)]
    assert threads() == before, "opening starts no thread"
    for loader in loaders:
        next(loader)
    assert threads() == before + 20
    del loader, loaders
    assert threads() == before


def test_faults_come_out_of_next_and_pass(shards: Path) -> None:
    """Document starts damaged after opening: the thread's error is raised where the batch is asked for."""
    loader = TokenLoader(shards, 2, 16, order="packed")
    path = sorted(shards.glob("*.bin"))[5]
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{path.name} is damaged: the start of document"):
            next(loader)
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        TokenLoader(shards, 2, 16, order="packed")
    with path.open("r+b") as file:
        file.write(content)
    assert loader.state_dict()["step"] == 0
    fresh = TokenLoader(shards, 2, 16, order="packed")
    assert torch.equal(next(loader).inputs, next(fresh).inputs)


@pytest.mark.parametrize("batch_size", [1, 50])  # a deep ring of small batches, a shallow one of large
def test_jumps_at_any_time_give_the_batch_of_the_step(tmp_path: Path, batch_size: int) -> None:
    """The ring drops what was prepared for the position before, however full it is and whoever sleeps."""
    documents = documents_of([1000] * 300)
    write(tmp_path / "x", documents, shard_tokens=200_000)
    seq_len = 4000 // batch_size
    loader = TokenLoader(tmp_path / "x", batch_size, seq_len)
    expected = [next(loader).inputs.clone() for _ in range(len(loader))]
    generator = np.random.default_rng(0)
    state = loader.state_dict()
    for _ in range(400):
        step = int(generator.integers(len(loader)))
        loader.load_state_dict({**state, "step": step})
        for at in range(step, min(step + int(generator.integers(1, 40)), len(loader))):
            assert torch.equal(next(loader).inputs, expected[at])
        if generator.random() < 0.05:
            time.sleep(0.005)  # until the ring is full and the thread asleep


def test_threads_may_share_a_source(shards: Path) -> None:
    """Each call gets the batch of the step that it asked for."""
    source = TokenLoader(shards, 2, 16)._loader
    expected = [source.next(step)[0].copy() for step in range(50)]

    def read(seed: int) -> bool:
        steps = np.random.default_rng(seed).integers(0, 50, 300)
        return all(np.array_equal(source.next(int(step))[0], expected[step]) for step in steps)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_threads_may_come_first_together(shards: Path) -> None:
    for _ in range(50):
        source = TokenLoader(shards, 2, 16)._loader
        barrier = threading.Barrier(4)

        def first(source: _text.Loader = source, barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            return int(source.next(0)[0].sum())

        with ThreadPoolExecutor(4) as pool:
            assert len({future.result(20) for future in [pool.submit(first) for _ in range(4)]}) == 1


def test_exit_while_daemon_threads_read(shards: Path) -> None:
    """Python unwinds a thread that wants its lock back at the end; nothing of ours may make that an abort.
    PyTorch aborts itself where such a thread drops a tensor made by from_numpy, hence arrays here."""
    code = (
        "import sys, threading, time; from itertools import count; from tapelm import TokenLoader\n"
        "def read(loader):\n"
        "    for step in count(): loader._loader.next(step)\n"
        "for _ in range(6):\n"
        "    threading.Thread(target=read, args=(TokenLoader(sys.argv[1], 8, 64),), daemon=True).start()\n"
        "time.sleep(0.2)"
    )
    exits_in_silence(code, shards)


def test_packed_windows_are_no_longer_than_the_corpus(shards: Path) -> None:
    with pytest.raises(
        ValueError, match=r"smaller than one block of 2147483647 \(seq_len\): add text or lower"
    ):
        TokenLoader(shards, 1, 2**31 - 1, order="packed")


def test_forked_children_continue(shards: Path) -> None:
    """A child has no prefetch thread; it starts its own and goes on where the parent was."""
    loader = TokenLoader(shards, 2, 16, order="packed")
    first = [next(loader) for _ in range(3)]
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        digest = hashlib.sha256(b"".join(next(loader).inputs.numpy().tobytes() for _ in range(5)))
        os.write(write_end, digest.digest())
        del loader, first
        os._exit(0)
    os.close(write_end)
    watchdog = threading.Timer(30, os.kill, (child, 9))
    watchdog.start()
    theirs = os.read(read, 32)
    assert os.waitpid(child, 0)[1] == 0
    watchdog.cancel()
    os.close(read)
    ours = hashlib.sha256(b"".join(next(loader).inputs.numpy().tobytes() for _ in range(5))).digest()
    assert theirs == ours


def test_exit_with_a_running_thread(shards: Path) -> None:
    code = (
        "import sys; from tapelm import TokenLoader; loader = TokenLoader(sys.argv[1], 2, 16); next(loader)"
    )
    exits_in_silence(code, shards)


def test_a_billion_tokens_open_at_once(tmp_path: Path) -> None:
    """Sparse shards: only headers may be read. The memory is that of this process before and after."""
    entries, tokens = [], 2**26
    for number in range(16):
        path = tmp_path / f"shard-{number:05d}.bin"
        path.write_bytes(_text.shard_header(2, tokens, 1000, VOCAB, END))
        os.truncate(path, 64 + 2 * tokens + 8000)
        entries.append({"file": path.name, "tokens": tokens, "documents": 1000, "sha256": "0" * 64})
    manifest = {
        "format": "tapelm-shards",
        "version": 2,
        "vocab_size": VOCAB,
        "end_of_text": END,
        "tokens": 16 * tokens,
        "documents": 16_000,
        "shards": entries,
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    code = """
import sys, time
from tapelm import TokenLoader
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, best = resident(), 1.0
for _ in range(200):  # other processes are in the way of most on a busy machine
    started = time.perf_counter()
    loader = TokenLoader(sys.argv[1], 16, 256)
    best = min(best, time.perf_counter() - started)
    if best < 0.02:
        break
next(loader)
print(best, resident() - before, loader.tokens)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(_text.__file__).parents[1])},
        timeout=120,
        check=True,
    )
    seconds, grown, opened = map(float, done.stdout.split())
    assert opened == 2**30 and seconds < 0.02 and grown < 10e6


def test_unusable_orders_and_devices(shards: Path) -> None:
    with pytest.raises(ValueError, match="order must be one of shuffled, sequential, packed, got 'random'"):
        TokenLoader(shards, 2, 16, order="random")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            TokenLoader(shards, 2, 16, device="cuda")

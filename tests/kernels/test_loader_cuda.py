"""On-device batches: the kernel's index arithmetic compiled for the host, and on a GPU the kernel itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tapelm import _text
from tapelm._batches import AssembledBatches, CopiedBatches
from tapelm.loader import ORDERS, TokenLoader
from tapelm.shards import write_shards

ROOT = Path(__file__).parents[2]
END = 999
SHAPES = [(1, 1), (2, 31), (3, 32), (2, 33), (3, 255), (2, 256), (2, 257), (1, 700), (4, 1024)]

# csrc/cuda/loader.cu with its threads in turn: between two __syncthreads() is one loop over them.
TWIN = r"""
#include <cstdio>
#include <vector>
#include "assemble.h"
using namespace tapelm::cuda;

template <typename Token>
void run(uint32_t batch, uint32_t seq_len, uint32_t end_of_text, bool packed) {
  std::vector<uint32_t> lengths(batch);
  std::vector<Token> rows(batch * (seq_len + 1ull));
  if (std::fread(lengths.data(), 4, batch, stdin) != batch) return;
  if (std::fread(rows.data(), sizeof(Token), rows.size(), stdin) != rows.size()) return;
  std::vector<int64_t> inputs(batch * seq_len, -7), targets(batch * seq_len, -7);
  std::vector<int32_t> ids(batch * seq_len, -7);
  for (uint32_t row = 0; row < batch; ++row) {
    const Row<Token> from{rows.data() + row * (seq_len + 1ull), lengths[row], end_of_text, packed};
    const uint64_t to = uint64_t{row} * seq_len;
    uint32_t ended = 0;
    for (uint32_t begin = 0; begin < seq_len; begin += kWarp * kWarps) {
      uint32_t ballots[kWarps] = {}, counts[kWarps];
      for (uint32_t i = 0; i < kWarp * kWarps; ++i) {
        ballots[i / kWarp] |= uint32_t{from.ends_document(begin + i)} << (i % kWarp);
      }
      for (uint32_t warp = 0; warp < kWarps; ++warp) counts[warp] = count_bits(ballots[warp]);
      for (uint32_t i = 0; i < kWarp * kWarps; ++i) {
        const uint32_t t = begin + i, lane = i % kWarp, warp = i / kWarp;
        if (t >= seq_len) continue;
        inputs[to + t] = from.input(t);
        targets[to + t] = from.target(t);
        ids[to + t] = static_cast<int32_t>(ended + ended_before(ballots[warp], lane, counts, warp));
      }
      ended += ended_in_all(counts);
    }
  }
  std::fwrite(inputs.data(), 8, inputs.size(), stdout);
  std::fwrite(targets.data(), 8, targets.size(), stdout);
  std::fwrite(ids.data(), 4, ids.size(), stdout);
}

int main() {
  uint32_t header[5];
  while (std::fread(header, 4, 5, stdin) == 5) {
    if (header[2] == 2) run<uint16_t>(header[0], header[1], header[3], header[4]);
    if (header[2] == 4) run<uint32_t>(header[0], header[1], header[3], header[4]);
  }
}
"""


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("twin")
    (directory / "twin.cpp").write_text(TWIN)
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension was built with a C++ compiler"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc' / 'cuda'}"]
    subprocess.run([compiler, *flags, "twin.cpp", "-o", "twin"], cwd=directory, check=True)
    return directory / "twin"


@pytest.fixture(scope="module", params=[1000, 70_000], ids=["uint16", "uint32"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many short documents, so that rows hold up to dozens of ends, and a few long ones."""
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(0, 40, 300), *generator.integers(0, 2500, 12), 0, 0, 0]
    documents = [generator.integers(0, END, n, dtype=np.uint32) for n in generator.permutation(lengths)]
    path = tmp_path_factory.mktemp("shards") / "x"
    write_shards(documents, path, vocab_size=request.param, end_of_text=END, shard_tokens=5000)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_kernel_arithmetic_equals_the_cpu_loader(twin: Path, shards: Path, order: str) -> None:
    requests, expected = [], []
    paths = sorted(map(str, shards.glob("*.bin")))
    for batch_size, seq_len in SHAPES:
        arguments = (paths, END, batch_size, seq_len, 3, 0, 1, ORDERS[order])
        stored, batches = _text.Loader(*arguments, True), _text.Loader(*arguments)
        for step in range(min(20, batches.steps_per_epoch)):
            rows, lengths = stored.next(step)
            header = np.array([batch_size, seq_len, rows.itemsize, END, order == "packed"], np.uint32)
            requests += [header.tobytes(), lengths.tobytes(), rows.tobytes()]
            expected += [array.tobytes() for array in batches.next(step)]
    done = subprocess.run([twin], input=b"".join(requests), stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"".join(expected) and len(done.stdout) > 100_000


def test_copies_to_other_devices(shards: Path) -> None:
    paths = sorted(map(str, shards.glob("*.bin")))
    source = CopiedBatches(_text.Loader(paths, END, 2, 16, 0, 0, 1), torch.device("meta"))
    assert [tensor.device.type for tensor in source.next(0)] == ["meta"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("assembled", [False, True], ids=["copied", "assembled"])
def test_batches_on_a_gpu(shards: Path, order: str, assembled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the GPU give the CPU's batches, also when they run far ahead of the device."""
    if assembled:
        pytest.importorskip("tapelm._cuda")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for batch_size, seq_len in SHAPES:
        on_cpu = TokenLoader(shards, batch_size, seq_len, order=order)  # type: ignore[arg-type]
        on_gpu = TokenLoader(shards, batch_size, seq_len, order=order, device="cuda")  # type: ignore[arg-type]
        assert isinstance(on_gpu._source, AssembledBatches) == assembled
        torch.cuda._sleep(10**7)  # so that a buffer used too early would be seen
        theirs = [next(on_gpu) for _ in range(20)]
        for batch in theirs:
            for ours, expected in zip(batch, next(on_cpu), strict=True):
                assert ours.device.type == "cuda" and torch.equal(ours.cpu(), expected)

"""Memory of the CPU ops: kept between calls, used again whatever the sizes, and released to nobody's harm."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import torch

import tapelm  # noqa: F401, registers the ops

MEASURED = """
import json, random, resource
import torch
import tapelm

torch.set_num_threads(1)
generator = random.Random(0)

def resident():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def block(megabytes):
    return tapelm.dropout(source[: int(megabytes * (1 << 18))], 0.5)

def faults(sizes, times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        for size in sizes:
            block(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

source = torch.zeros(48 << 18)
sizes = [1.5, 40, 3, 10, 1.1, 25.3, 6]
faults(sizes, 2)
again = faults(sizes, 10)

before, held, most = resident(), [], 0.0
for _ in range(3000):
    while held and (generator.random() < 0.45 or sum(held_size for held_size, _ in held) > 200):
        held.pop(generator.randrange(len(held)))
    size = generator.choice([1, 1.5, 2, 2.7, 8, 16, 33])
    held.append((size, block(size)))
    most = max(most, sum(held_size for held_size, _ in held))
print(json.dumps({"faults": again, "grown": resident() - before, "most": most * 2**20}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_blocks_are_used_again_whatever_their_sizes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["faults"] < 100, "of the 5,000 pages and more that 10 rounds touch"
    assert found["grown"] < 1.35 * found["most"], "what is kept is about what was used at once"


def test_threads_take_blocks_that_do_not_overlap() -> None:
    def work(number: int) -> None:
        source = torch.full((1 << 20,), number / 4).bfloat16()
        held = []
        for turn in range(300):
            held.append(torch.ops.tapelm.swiglu_forward(source[: (1 << 20) - 64 * turn], source[64 * turn :]))
            del held[: len(held) - 20]
        right.append(all(bool((each == held[0][0]).all()) for each in held))

    right: list[bool] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


def test_more_than_there_is_memory_is_an_error() -> None:
    weight = torch.empty(1, 1).expand(1 << 40, 1)
    with pytest.raises(RuntimeError, match=r"not enough memory|can't allocate"):
        torch.ops.tapelm.linear_forward(torch.empty(64, 1), weight, None)


EMPTIED = """
import json
import torch
import tapelm

def resident():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

def sizes():
    return [tapelm.memory_stats()[f"{kind}_bytes.all.current"] for kind in ("allocated", "reserved")]

source = torch.ones(64 << 18)
before = sizes()
blocks = [tapelm.dropout(source, 0.5) for _ in range(3)]
held = sizes()
middle, expected = blocks[1], blocks[1].clone()
blocks.clear()
full = resident()
tapelm.empty_cache()
parts, given = sizes(), full - resident()
same = bool((middle == expected).all())
del middle
free = sizes()
tapelm.empty_cache()
after = sizes()
again = float((tapelm.dropout(source, 0.5) > 0).float().mean())
print(json.dumps([before, held, parts, given, same, free, after, again]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_empty_cache_gives_back_what_no_tensor_uses() -> None:
    done = subprocess.run([sys.executable, "-c", EMPTIED], capture_output=True, text=True, check=True)
    before, held, parts, given, same, free, after, again = json.loads(done.stdout)
    block = 64 << 20
    assert before == [0, 0] and after == [0, 0]
    assert held[0] == 3 * block and held[1] >= held[0]
    assert parts == [block, held[1]] and same, "a segment with a tensor in it stays, and the tensor too"
    assert given > 1.9 * block, "pages before and behind it go"
    assert free == [0, held[1]] and abs(again - 0.5) < 0.01

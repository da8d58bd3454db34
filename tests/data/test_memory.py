"""Memory of `python -m data.prepare` does not grow with the text that streams through."""

import json
import random
import re
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Few grams are remembered, so that both corpora here have more, as 10 GB have more than the default.
PROGRAM = (
    "import sys; from pathlib import Path; from data import leaks; from data.prepare import Config, prepare; "
    "leaks.MOST_GRAMS = 1 << 18; "
    "prepare(Config(out=Path(sys.argv[2]), source=('files',), input=(sys.argv[1],), vocab_size=1000)); "
    "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # kB
)


def write_synthetic(path, megabytes):
    """Dated articles of some 2 kB, words by Zipf's law, no two alike."""
    generator = random.Random(megabytes)
    vocabulary = [f"{a}{b}{c}" for a in "bdgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "ck", "lly")]
    weights = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            day = date(2000, 1, 1) + timedelta(days=int(6000 * written / (megabytes * 1e6)))
            text = " ".join(generator.choices(vocabulary, weights, k=420))
            written += file.write(json.dumps({"text": text, "date": str(day)}) + "\n")


def peak_megabytes(tmp_path, megabytes):
    path = tmp_path / f"{megabytes}.jsonl"
    write_synthetic(path, megabytes)
    command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / f"out-{megabytes}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(re.search(r"VmHWM:\s*(\d+)", done.stdout)[1]) / 1000  # type: ignore[index]


@pytest.mark.slow
def test_memory_hardly_grows_with_the_text(tmp_path):
    """Buffers fill up first: a line through these two would end at 2.3 GB for 10 GB, which took 0.88."""
    small, large = peak_megabytes(tmp_path, 140), peak_megabytes(tmp_path, 560)
    assert large < 700 and large - small < 120

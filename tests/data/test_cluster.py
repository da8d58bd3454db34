"""The datatrove pipeline with its local executor on two processes keeps what data.prepare would keep."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data.cleaning import Filters
from data.cluster import Clean, ClusterConfig, record, stages
from gpt.cli import UserError

ROOT = Path(__file__).parents[2]
WORDS = [f"{a}{b}" for a in "bdgklmnprst" for b in ("an", "er", "ist", "ock", "ully")]


def write_input(folder):
    """Three files of 40 documents; in the last, 10 copies with one word changed and 5 that are too short."""
    generator = random.Random(0)
    folder.mkdir()
    texts = [" ".join(generator.choices(WORDS, k=120)) for _ in range(105)]
    texts += [f"{text} changed" for text in texts[:10]] + ["short"] * 5
    rows = [
        {"id": f"d{n}", "text": text, "source": "wire", "date": "2015-01-02", "available_at": "2015-01-03"}
        for n, text in enumerate(texts)
    ]
    for part in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in rows[part * 40 : part * 40 + 40])
        (folder / f"{part}.jsonl").write_text(lines)


def test_settings_and_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"has no \.jsonl file"):
        ClusterConfig(input=tmp_path, out=tmp_path / "out")
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(UserError, match="--tasks must be at least 1"):
        ClusterConfig(input=tmp_path, out=tmp_path / "out", tasks=0)


def test_without_datatrove(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").touch()
    monkeypatch.setitem(sys.modules, "datatrove", None)
    for name in [name for name in sys.modules if name.startswith("datatrove.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"pip install 'tapelm\[cluster\]'"):
        stages(ClusterConfig(input=tmp_path, out=tmp_path / "out"))


def test_the_cleaning_step_counts_what_it_drops(tmp_path):
    class Fake:
        def __init__(self, text):
            self.text, self.id, self.metadata = text, text, {"source": "wire"}

    step = Clean(Filters(min_chars=8), tmp_path / "dropped")
    kept = list(step(iter([Fake("A  longer text."), Fake("short")]), rank=3))
    assert [document.text for document in kept] == ["A longer text."]
    assert json.loads((tmp_path / "dropped" / "00003.json").read_text()) == {"wire": {"too short": 1}}
    assert record(None, kept[0])["text"] == "A longer text." and record(None, kept[0])["date"] is None


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps(tmp_path):
    pytest.importorskip("datatrove")
    write_input(tmp_path / "in")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.cluster", "--input", str(tmp_path / "in"), "--out", str(out)]
    command += ["--tasks", "2", "--workers", "2", "--min-chars", "20"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = []
    for path in sorted((out / "documents").glob("*.jsonl.gz")):
        rows += map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
    assert len(rows) == 105
    assert {row["id"] for row in rows} >= {f"d{number}" for number in range(10, 105)}
    for number in range(10):
        assert len({f"d{number}", f"d{number + 105}"} & {row["id"] for row in rows}) == 1
    assert rows[0] | {"id": "", "text": ""} == {
        "id": "", "text": "", "source": "wire", "date": "2015-01-02", "available_at": "2015-01-03"
    }  # fmt: skip
    dropped = [json.loads(path.read_text()) for path in (out / "dropped").iterdir()]
    assert len(dropped) == 2 and {"wire": {"too short": 5}} in dropped

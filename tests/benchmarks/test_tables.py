"""The README's tables are what the committed results say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import tables
from benchmarks.harness import Row, write_results
from gpt.cli import UserError

CPU = torch.device("cpu")


def test_readme_holds_the_committed_results() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert tables.BLOCK.search(text), "the README has no table"
    assert tables.splice(text) == text, "run make readme-tables"


def test_every_opened_table_is_closed() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    ours = Row(
        "train x", "optimized", "1 x 2", "bfloat16", "cpu", 10.0, 9.0, 11.0, {"plain": 3.0}, "9 GFLOP/s", 0.5
    )
    ours.extra["tokens_per_second"] = 1234.5
    plain = Row(
        "train x", "plain", "1 x 2", "float32", "cpu", 30.0, 9.0, 31.0, {"plain": 1.0}, "9 GFLOP/s", 0.5
    )
    plain.extra["tokens_per_second"] = 411.0
    write_results(tmp_path / "a.json", CPU, [plain, ours])
    text = "before\n<!-- table steps a.json -->\nstale\n<!-- end -->\nafter\n"
    made = tables.splice(text, tmp_path)
    assert made.startswith("before\n<!-- table steps a.json -->\n| train x, 1 x 2 tokens |")
    assert "| optimized | 10 ms | 3.0× | 1,234 |" in made and "stale" not in made
    assert "commit" in made and made.endswith("<!-- end -->\nafter\n")
    assert tables.splice(made, tmp_path) == made
    ours.median_ms = 11.0
    write_results(tmp_path / "a.json", CPU, [plain, ours])
    assert tables.splice(made, tmp_path) != made


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- table steps b.json -->\n<!-- end -->", "there is no"),
        ("<!-- table pie a.json -->\n<!-- end -->", "no table of kind 'pie'"),
        ("<!-- table ladder a.json -->\n<!-- end -->", "has no rows of ladder"),
    ],
)
def test_what_cannot_be_made_is_named(tmp_path: Path, text: str, told: str) -> None:
    write_results(tmp_path / "a.json", CPU, [])
    with pytest.raises(UserError, match=told):
        tables.splice(text, tmp_path)

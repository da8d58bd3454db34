"""The report is one file with everything in it, and the table of models compares what can be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, models, page
from benchmarks.harness import Row, write_results
from gpt.cli import UserError

CPU = torch.device("cpu")
RUNGS = ("plain fp32", "+ bf16 <autocast>", "+ loader")


def row(subject: str, variant: str, ratios: dict[str, float], fraction: float = 0.5, **extra: float) -> Row:
    return Row(subject, variant, "4 x 256", "bfloat16", "cpu", 10, 9, 11, ratios, "9 GB/s", fraction, extra)


def rows() -> list[Row]:
    extra = {"tokens_per_second": 100.0, "loss": 5.0, "peak_memory_bytes": 1e9}
    extra |= {"gain_error": 0.01, "ratio_error": 0.02}
    ladder = [
        row(f"ladder {title}", name, {RUNGS[0]: 2.0, "before": 1.5}, **extra)
        for title in ("gpt seed", "llama x")
        for name in RUNGS
    ]
    removal = [
        row("removal gpt seed", name, {RUNGS[2]: 0.9}, **extra) for name in (RUNGS[2], "without loader")
    ]
    ops = [row("norm", "torch", {"torch": 1.0}), row("norm", "tapelm", {"torch": 2.0}, fraction=1.2)]
    peers = [
        row("peers seed", "ours", {"ours": 1.0}, **extra),
        row("peers seed", "x <y>", {"ours": 0.5}, **extra),
    ]
    peers.append(row("peers llm.c's GPT-2", "ours", {"ours": 1.0}, tokens_per_second=90.0))
    generated = [row(f"{what} seed", "cached", {"x": 2.0}, **extra) for what in ("prefill", "decode")]
    return [*ladder, *removal, *peers, *generated, *ops]


SECTION = {
    "title": "gpt seed", "skipped": ["x: <y>"], "product_of_steps": 2.0, "total": 2.1,
    "losses": {name: [9.0, 8.0] for name in RUNGS}, "step_seconds": {name: [1.0, 2.0] for name in RUNGS},
    "profile": {"accounted": 0.97},
}  # fmt: skip


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    ladders = [SECTION, SECTION | {"title": "llama x"}]
    write_results(tmp_path / "results.json", CPU, rows(), ladders=ladders, skipped_peers=["z: no checkout"])
    text = page.write(compare.read(tmp_path / "results.json"), tmp_path).read_text(encoding="utf-8")
    assert text.count("<img") == 10 == text.count("data:image/png;base64,")
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert "+ bf16 &lt;autocast&gt;" in text and "<autocast>" not in text
    assert "Above the ceiling" in text and "norm 4 x 256, tapelm: 120%" in text
    assert text.count("<h2>The training step") == 2 and "left out: x: &lt;y&gt;" in text
    made = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert made.count("| + loader | 10 ms | 100 |") == 2 == made.count("The gains multiply to")
    assert "<h2>Generating text</h2>" in text and "<td>cached</td>" in text.replace(' class="name"', "")
    assert "| cached | 10.0 ms | 10.00 ms | 100 | 2.0× | 50% |" in made
    assert "A training step of gpt seed, 4 x 256 tokens: 2.10 times as fast as plain fp32." in text
    assert (
        "<h2>Other trainers</h2>" in text
        and "x &lt;y&gt;" in text
        and "Not measured: z: no checkout." in text
    )
    assert "| x <y> | 10 ms | 100 | 2.00× ±0.04 | 5.000 |" in made
    assert "| llm.c's GPT-2, 4 x 256 tokens |" in made and "| ours | 10 ms | 90 |  |  |" in made


def test_rungs_are_ours_from_the_first_that_is_called_so() -> None:
    names = ["plain fp32", "+ bf16", "+ our AdamW", "+ attention"]
    assert page.colours(names) == [page.PEER, page.PEER, page.OURS, page.OURS]
    assert page.colours(["without four"]) == [page.PEER]


def test_parts_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", CPU, rows()[-2:])
    text = page.write(compare.read(tmp_path / "results.json"), tmp_path).read_text(encoding="utf-8")
    assert text.count("<img") == 1 and "The training step" not in text


TEXT = "abcdef0123" * 6


def write_run(
    folder: Path, limit: int = 100, evaluation: bool = True, text: str | None = TEXT, **summary: float
) -> Path:
    folder.mkdir()
    of_text = {} if text is None else {"text_sha256": text}
    trained = {"val_loss": 2.5, "model_bytes": 2e6, "device": "cpu", **of_text, **summary}
    (folder / "summary.json").write_text(json.dumps(trained))
    if evaluation:
        total = {"loss": 2.0, "perplexity": 7.39, "bits_per_byte": 1.1}
        content = {"split": "val", "max_bytes": limit, "total": total, **of_text}
        (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_the_table_of_models_says_what_a_loss_is_of(tmp_path: Path, capsys) -> None:
    plain, other = write_run(tmp_path / "plain"), write_run(tmp_path / "other")
    assert models.run([plain, other], tmp_path) == 0
    table = (tmp_path / "models.md").read_text().splitlines()
    line = " | 2.0000 | 7.390 | 1.1000 | evaluation: val, 100 bytes a source of abcdef01 | - | 2.0 |"
    assert len(table) == 4
    assert table[2].startswith(f"| plain{line}") and table[3].startswith(f"| other{line}")
    trained = write_run(tmp_path / "trained", evaluation=False)
    fine_tuning: dict[str, Any] = {"base_val_loss": 3.0, "best_val_loss": 2.25, "perplexity": 9.49}
    lora = write_run(tmp_path / "lora", evaluation=False, **fine_tuning)
    assert models.run([plain, trained, lora], tmp_path) == 0
    table = (tmp_path / "models.md").read_text().splitlines()
    assert table[3].startswith("| trained | 2.5000 | - | - | training: part of val of abcdef01 | - | 2.0 |")
    assert table[4].startswith("| lora | 2.2500 | 9.490 | - | fine-tuning: part of val of abcdef01 |")
    assert (
        table[6].startswith("Losses are of different parts") and "different parts" in capsys.readouterr().out
    )


@pytest.mark.parametrize("other", [{"text": "f" * 64}, {"text": "f" * 64, "evaluation": False}, {"limit": 7}])
def test_losses_of_different_texts_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "other", **other)]
    with pytest.raises(UserError, match=r"different text.*plain evaluation: val, 100 bytes.*same --data"):
        models.run(runs, None)


def test_a_text_that_is_not_recorded_is_remarked(tmp_path: Path, capsys) -> None:
    runs = [write_run(tmp_path / "plain"), write_run(tmp_path / "old", text=None)]
    assert models.run(runs, tmp_path) == 0
    assert "100 bytes a source of unknown text |" in (tmp_path / "models.md").read_text()
    assert "may be of another text" in capsys.readouterr().out


def test_a_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no summary\.json, evaluation\.json, sample\.json in"):
        models.run([tmp_path], None)
    with pytest.raises(UserError, match="models takes run directories"):
        models.run([], None)

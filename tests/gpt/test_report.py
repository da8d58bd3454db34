"""The report about two runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gpt.cli import UserError
from gpt.report import ROWS, main


def row(bits: float) -> dict[str, float]:
    others = {f"{name}_bits_per_byte": 2.0 for name in ("unigram", "bz2", "xz")}
    return {"bits_per_byte": bits, "perplexity": 9.5, **others}


def write_run(directory: Path, *, speed: float, batches: str) -> None:
    directory.mkdir()
    summary = {
        "tokens_per_second": speed,
        "step_ms_median": 1e6 / speed,
        "mfu": 0.5,
        "train_loss": 2.5,
        "val_loss": 2.6,
        "peak_memory_bytes": 3e8,
        "model_bytes": 1e7,
        "seconds": 60.0,
        "device": "a <CPU>",
        "precision": "fp32",
        "versions": {"torch": "2.13"},
        "batches_sha256": batches,
    }
    evaluation = {"split": "val", "domains": {"news & more": row(1.25)}, "total": row(1.25)}
    sample = {"text": "The <economy> grew.", "latency_ms": 100.0, "tokens_per_second": 80.0}
    for name, content in {"summary": summary, "evaluation": evaluation, "sample": sample}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    steps = [
        {"step": i, "loss": 3.0 - i / 10, "tokens_per_second": speed, "seconds": i / 2} for i in range(1, 6)
    ]
    steps[-1]["val_loss"] = 2.6
    (directory / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


@pytest.mark.parametrize("batches", ("aa11", "bb22"))
def test_report_holds_both_runs_and_is_self_contained(
    batches: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "p", speed=1000.0, batches="aa11")
    write_run(tmp_path / "o", speed=2500.0, batches=batches)
    runs = ["--plain", str(tmp_path / "p"), "--optimized", str(tmp_path / "o")]
    assert main([*runs, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["speedup"] == 2.5 and report["same_batches"] == (batches == "aa11")
    by_metric = {line["metric"]: line for line in report["table"]}
    assert len(by_metric) == len(ROWS)
    assert by_metric["tokens/s"] == {"metric": "tokens/s", "plain": 1000.0, "optimized": 2500.0, "ratio": 2.5}
    assert by_metric["model size"]["ratio"] == 1.0

    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "The &lt;economy&gt; grew." in page and "news &amp; more" in page and "a &lt;CPU&gt;" in page
    assert ("DIFFERENT batches" in page) == (batches != "aa11")
    shown = capsys.readouterr().out
    assert "2.5×" in shown and ("DIFFERENT" in shown) == (batches != "aa11")


def test_missing_part_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "p", speed=1.0, batches="")
    (tmp_path / "p" / "sample.json").unlink()
    with pytest.raises(UserError, match=r"no sample\.json in .*p"):
        main(["--plain", str(tmp_path / "p"), "--optimized", str(tmp_path / "p"), "--out", str(tmp_path)])

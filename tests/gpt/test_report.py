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


def write_run(directory: Path, *, speed: float, batches: str, layers: int = 1, step: int = 5) -> None:
    directory.mkdir()
    summary = {
        "tokens_per_second": speed,
        "step_ms_median": 1e6 / speed,
        "mfu": 0.5,
        "date": "2020-02-03T04:05:06+00:00",
        "train_loss": 2.5,
        "val_loss": 2.613 if speed > 2000 else 2.6,
        "peak_memory_bytes": 3e8,
        "model_bytes": 1e7,
        "seconds": 60.0,
        "device": "a <CPU>",
        "precision": "bf16" if speed > 2000 else "fp32",
        "versions": {"torch": "2.13"},
        "model": {"n_layer": layers},
        "config": {"seed": 1, "kernels": "optimized" if speed > 2000 else "plain"},
        "batches_sha256": batches,
    }
    evaluation = {
        "split": "val",
        "step": step,
        "max_bytes": 1000,
        "domains": {"news & more": row(1.25)},
        "total": row(1.25),
    }
    sample = {"text": "The <economy> grew.", "new_tokens": 8, "ms_per_token": 12.5, "tokens_per_second": 80.0}
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
    assert "The optimized GPT (bf16) trains 2.50× as fast as the plain one (fp32)" in page
    assert "<td>2020-02-03 04:05 UTC</td>" in page and "<td>12.50 ms</td>" in page
    assert "one after the other" in page and "python -m benchmarks train" in page
    assert report["val_loss_apart"] == pytest.approx(0.005) and "ended\n0.50% apart" in page
    assert "Bits per byte on the first 1,000 bytes of each domain of the val split" in page
    shown = capsys.readouterr().out
    assert "first 1,000 bytes of each domain" in shown and "one after the other" in shown
    assert "2.500×" in shown and "0.50% apart" in shown and ("DIFFERENT" in shown) == (batches != "aa11")


def test_runs_scored_on_different_text_are_not_compared(tmp_path: Path) -> None:
    for name in ("p", "o"):
        write_run(tmp_path / name, speed=1.0, batches="")
    path = tmp_path / "o" / "evaluation.json"
    runs = ["--plain", str(tmp_path / "p"), "--optimized", str(tmp_path / "o"), "--out", str(tmp_path)]
    evaluation = json.loads(path.read_text())
    path.write_text(json.dumps(evaluation | {"max_bytes": 0}))
    with pytest.raises(UserError, match="different text"):
        main(runs)
    del evaluation["max_bytes"]
    path.write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match=r"evaluation\.json has no max_bytes"):
        main(runs)


def test_missing_part_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "p", speed=1.0, batches="")
    (tmp_path / "p" / "sample.json").unlink()
    with pytest.raises(UserError, match=r"no sample\.json in .*p"):
        main(["--plain", str(tmp_path / "p"), "--optimized", str(tmp_path / "p"), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("plain", "optimized", "match"),
    [
        ({"speed": 1000.0}, {"speed": 1100.0}, "--optimized is a run with --kernels plain"),
        ({"speed": 1000.0}, {"speed": 2500.0, "layers": 2}, "different models"),
        ({"speed": 1000.0, "step": 4}, {"speed": 2500.0}, "plain was evaluated at step 4 and trained to 5"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, plain: dict[str, float], optimized: dict[str, float], match: str
) -> None:
    write_run(tmp_path / "p", batches="aa", **plain)  # type: ignore[arg-type]
    write_run(tmp_path / "o", batches="aa", **optimized)  # type: ignore[arg-type]
    runs = ["--plain", str(tmp_path / "p"), "--optimized", str(tmp_path / "o")]
    with pytest.raises(UserError, match=match):
        main([*runs, "--out", str(tmp_path / "report")])

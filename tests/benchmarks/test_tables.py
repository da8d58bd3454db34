"""The tables of the README and of the page of results are what the committed results say."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from benchmarks import table_kinds, tables
from benchmarks.harness import Row, write_results
from gpt.cli import UserError
from gpt.hardware import fingerprint

CPU = torch.device("cpu")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_pages_hold_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.BLOCK.search(text), "the page has no table"
    assert tables.splice(text) == text, "run make readme-tables"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_every_opened_table_is_closed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))


def test_every_committed_result_is_named_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    named = re.findall(r"[\w.*-]+", text)
    files = [path.name for path in tables.RESULTS.glob("*.json")]
    assert [file for file in files if not any(fnmatch(file, name) for name in named)] == []


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


def test_summary_has_the_range_of_an_op_and_the_ceiling_of_its_longest_shape(tmp_path: Path) -> None:
    def pair(shape: str, milliseconds: float, ratio: float, of_ceiling: float) -> list[Row]:
        rest = ("bfloat16", "cpu", milliseconds, milliseconds, milliseconds)
        return [
            Row("gelu fwd", "torch", shape, *rest, {"torch": 1.0}, "60 GB/s copy", 0.1),
            Row("gelu fwd", "other", shape, *rest, {"torch": 99.0}, "60 GB/s copy", 0.9),
            Row("gelu fwd", "tapelm", shape, *rest, {"torch": ratio}, "60 GB/s copy", of_ceiling),
        ]

    write_results(tmp_path / "a.json", CPU, [*pair("8x8", 9.0, 3.21, 0.77), *pair("1x8", 0.1, 0.98, 0.01)])
    made = tables.splice("<!-- table summary a.json -->\n<!-- end -->", tmp_path)
    assert "| gelu fwd | 0.98 to 3.2× | 77% |  |  | copy |" in made and "99×" not in made


def test_generation_has_a_line_for_each_variant(tmp_path: Path) -> None:
    rows = []
    for subject, milliseconds in (("prefill seed", 30.0), ("decode seed", 4.0)):
        for variant, factor in (("plain", 1.0), ("ours", 0.5)):
            times = (milliseconds * factor,) * 3
            ratios = {"plain": 1 / factor}
            row = Row(subject, variant, "8 + 4", "float32", "cpu", *times, ratios, "60 GB/s copy", 0.25)
            row.extra["tokens_per_second"] = 1e3 / times[0]
            rows.append(row)
    write_results(tmp_path / "a.json", CPU, rows)
    made = tables.splice("<!-- table generation a.json -->\n<!-- end -->", tmp_path)
    assert "| seed, 8 + 4 tokens | prompt | a further token |" in made
    assert "| ours | 15.0 ms | 2.00 ms | 500 | 2.0× | 25% |" in made


def test_a_model_of_transformers_has_a_line_for_each_variant(tmp_path: Path) -> None:
    rows = []
    for variant, step in (("transformers", 400.0), ("tapelm.hf", 160.0)):
        ratios = {"transformers": 400.0 / step}
        row = Row(
            "hf llama",
            variant,
            "6 layers, 4 x 512",
            "bfloat16",
            "cpu",
            *(step,) * 3,
            ratios,
            "9 GFLOP/s",
            0.8,
        )
        row.extra["tokens_per_second"] = 1e3 * 2048 / step
        rows.append(row)
    write_results(tmp_path / "a.json", CPU, rows)
    made = tables.splice("<!-- table hf a.json -->\n<!-- end -->", tmp_path)
    assert "| hf llama, 6 layers, 4 x 512 tokens | step |" in made
    assert "| tapelm.hf | 160 ms | 2.50× | 12,800 | 80% of 9 GFLOP/s |" in made


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*-all-*.json")), ids=lambda path: path.stem)
def test_every_removal_of_committed_results_is_in_the_table(path: Path) -> None:
    results = tables.opened(path)
    removals = [row for row in results.rows if row.variant.startswith("without ")]
    made = table_kinds.ladder(results)
    assert removals
    for row in removals:
        loss, error = 1 / next(iter(row.ratio_vs.values())), row.extra["ratio_error"]
        assert f"{loss:.2f}× ±{loss * error:.2f} |" in made, row.variant
    assert made.count("| AdamW: ") == made.count("| bf16: ") == 1


def test_tables_of_evaluations(tmp_path: Path) -> None:
    of_run = {"split": "val", "trained": {"tokens": 2_000_000, "seconds": 61.0}, "machine": fingerprint(CPU)}
    scores = {"bytes": 1234, "perplexity": 5.0, "bits_per_byte": 0.7, "unigram_bits_per_byte": 1.7}
    scores |= {"bz2_bits_per_byte": 1.3, "xz_bits_per_byte": 1.2}
    (tmp_path / "texts.json").write_text(json.dumps(of_run | {"domains": {"fed": scores}, "total": scores}))
    method = {"nll": [5.5, 5.4, 5.6], "crps": [0.5, 0.4, 0.6]}
    method |= {"model_nll_difference": [-0.006, -0.008, -0.004], "model_crps_ratio": [0.99, 0.98, 1.0]}
    method |= {
        f"coverage_{level}": [level / 100, level / 100 - 0.02, level / 100 + 0.02] for level in (50, 80, 95)
    }
    direction = {"accuracy": [0.5, 0.48, 0.52], "mcc": [0.01, -0.02, 0.04], "share_called_up": 0.25}
    part = {"rows": 9, "methods": {"EWMA": method}, "direction": direction | {"share_up": 0.51}}
    evaluated = of_run | {"rows": 9, "domains": {"stocks": part}, "total": part}
    (tmp_path / "tape.json").write_text(json.dumps(evaluated))
    text = "".join(
        f"<!-- table {kind} {kind[:4]}.json -->\n<!-- end -->\n" for kind in ("texts", "forecasts")
    )
    text = text.replace("text.json", "texts.json").replace("fore.json", "tape.json")
    made = tables.splice(text, tmp_path)
    assert "| val, after 2.0 M tokens, 61 s of training | bytes |" in made
    assert "| fed | 1,234 | 5.00 | 0.700 | 1.700 | 1.300 | 1.200 |" in made
    numbers = "5.500 ±0.100 | 0.500 ±0.100 | 50.0 ±2.0 | 80.0 ±2.0 | 95.0 ±2.0 | -0.006 ±0.002 | 0.990 ±0.010"
    for name in ("stocks", "all"):
        assert f"| {name}, 9 rows: EWMA | {numbers} |" in made
    assert (
        "50.0 ±2.0% of changes other than 0 are called right, MCC 0.010 ±0.030; up is called in 25.0%" in made
    )


@pytest.mark.parametrize(
    ("errors", "head", "cell"),
    [({}, "to the power", "1.16"), ({"n_embd": 0.149}, "to the power, ± standard error", "1.16 ±0.15")],
)
def test_exponents_have_their_errors_where_the_file_has_them(errors, head, cell, tmp_path: Path) -> None:
    plan = {"exponents": {"n_embd": 1.161}, "held_out_errors": {"6x192": -0.008}}
    write_results(tmp_path / "a.json", CPU, [], plan=plan | ({"exponent_errors": errors} if errors else {}))
    made = tables.splice("<!-- table scaling a.json -->\n<!-- end -->", tmp_path)
    assert f"| a step's time goes with | {head} |" in made and f"| n embd | {cell} |" in made


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

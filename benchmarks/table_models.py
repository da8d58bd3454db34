"""Tables of what gpt.evaluate measured: text in bits per byte, forecasts of a tape of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.compare import Results
from benchmarks.markdown import markdown
from gpt.forecast import direction_line


def texts(results: Results) -> str:
    """Bits per byte of a model that gpt.evaluate scored, beside the compressors."""
    domains = results.content["domains"] | {"all": results.content["total"]}
    keys = ("bits_per_byte", "unigram_bits_per_byte", "bz2_bits_per_byte", "xz_bits_per_byte")
    return markdown(
        (_of_run(results), "bytes", "perplexity of a token", "bits/byte", "unigram", "bz2 -9", "xz -9"),
        [
            (name, f"{row['bytes']:,}", f"{row['perplexity']:.2f}", *(f"{row[key]:.3f}" for key in keys))
            for name, row in domains.items()
        ],
    )


def forecasts(results: Results) -> str:
    """NLL, CRPS and coverage with half their 95% intervals, of the model and of the methods beside it."""
    keys = ("nll", "crps", "coverage_50", "coverage_80", "coverage_95")
    keys += ("model_nll_difference", "model_crps_ratio")
    domains = results.content["domains"] | {"all": results.content["total"]}
    lines = [
        (f"{name}, {domain['rows']:,} rows: {method}", *(_with_interval(scores, key) for key in keys))
        for name, domain in domains.items()
        for method, scores in domain["methods"].items()
    ]
    table = markdown(
        (
            _of_run(results), "NLL", "CRPS", "inside 50%", "80%", "95%", "model's NLL less this one's",
            "model's CRPS to this one's",
        ),
        lines,
    )  # fmt: skip
    return f"{table}\n{direction_line(results.content)}\n"


def _of_run(results: Results) -> str:
    trained = results.content["trained"]
    return (
        f"{results.content['split']}, after {trained['tokens'] / 1e6:.1f} M tokens, "
        f"{trained['seconds']:,.0f} s of training"
    )


def _with_interval(scores: dict[str, Sequence[float]], key: str) -> str:
    if key not in scores:
        return ""
    middle, low, high = scores[key]
    if key.startswith("coverage"):
        return f"{100 * middle:.1f} ±{50 * (high - low):.1f}"
    sign = "+" if key == "model_nll_difference" else "-"
    return f"{middle:{sign}.3f} ±{(high - low) / 2:.3f}"

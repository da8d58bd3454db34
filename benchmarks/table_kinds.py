"""One function for each kind of table: Markdown from a file of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.compare import Results
from benchmarks.harness import Row
from benchmarks.markdown import markdown
from benchmarks.table_models import forecasts, texts
from gpt.cli import UserError

NOT_OPS = (
    "train", "ladder", "removal", "peers", "scaling", "loader", "open", "encode", "load", "cold", "warm",
    "merges", "llama", "hf", "prefill", "decode",
)  # fmt: skip
"""How the subjects begin whose rows are not of one op."""
BEGINS = {"AdamW": "+ our AdamW", "bf16": "+ bf16"}
"""Of removals that are not called as their line is: how that begins."""


def chosen(results: Results, prefix: str) -> list[Row]:
    """Rows of the subjects that begin with `prefix`. Raises UserError when there are none."""
    rows = [row for row in results.rows if row.subject.startswith(prefix)]
    if not rows:
        raise UserError(
            f"{results.path} has no rows of {prefix}: write it with python -m benchmarks {prefix}"
        )
    return rows


def _speed_up(row: Row) -> float:
    """Relative to the first thing the row was compared with."""
    return next(iter(row.ratio_vs.values()))


def steps(results: Results) -> str:
    rows = chosen(results, "train")
    head = (
        f"{rows[0].subject}, {rows[0].shape} tokens",
        "median",
        "speed-up",
        "tokens/s",
        "of the GEMM peak",
        "peak memory",
    )
    return markdown(
        head,
        [
            (
                row.variant, f"{row.median_ms:.0f} ms", f"{_speed_up(row):.1f}×",
                f"{row.extra['tokens_per_second']:,.0f}", f"{row.fraction_of_ceiling:.0%} of {row.ceiling}",
                megabytes(row),
            )
            for row in rows
        ],
    )  # fmt: skip


def hf(results: Results) -> str:
    """The step of a model of transformers, stock and optimized."""
    rows = chosen(results, "hf ")
    return markdown(
        (_heading(rows[0]), "step", "speed-up", "tokens/s", "of the GEMM peak"),
        [
            (
                row.variant, f"{row.median_ms:.0f} ms", f"{_speed_up(row):.2f}×",
                f"{row.extra['tokens_per_second']:,.0f}", f"{row.fraction_of_ceiling:.0%} of {row.ceiling}",
            )
            for row in rows
        ],
    )  # fmt: skip


def _heading(row: Row) -> str:
    return f"{row.subject}, {row.shape} tokens"


def ladder(results: Results) -> str:
    """Every ladder of the file."""
    sections = results.content.get("ladders", [])
    if not sections:
        raise UserError(f"{results.path} has no rows of ladder: write it with python -m benchmarks ladder")
    return "\n".join(ladder_of(results, section) for section in sections)


def ladder_of(results: Results, section: dict[str, Any]) -> str:
    """Gains with their standard errors; beside them what the last step loses without the rung, where it was
    timed, or without the part of it that is named."""
    rows = chosen(results, f"ladder {section['title']}")
    first = rows[0].variant
    removed: dict[str, list[str]] = {}
    for row in results.rows:
        if row.subject == f"removal {section['title']}" and row.variant.startswith("without "):
            name = row.variant.removeprefix("without ")
            line = line_of(name, [row.variant for row in rows])
            part = "" if line == f"+ {name}" else f"{name}: "
            loss = _gain(1 / _speed_up(row), row.extra.get("ratio_error"))
            removed.setdefault(line, []).append(part + loss)
    table = markdown(
        (
            _heading(rows[0]), "step", "tokens/s", "of the GEMM peak", "gain", "speed-up",
            "slower without it", "peak memory", "loss",
        ),
        [
            (
                row.variant, f"{row.median_ms:.0f} ms", f"{row.extra['tokens_per_second']:,.0f}",
                f"{row.fraction_of_ceiling:.0%}",
                _gain(row.ratio_vs["before"], row.extra.get("gain_error")) if row.variant != first else "",
                f"{row.ratio_vs[first]:.2f}×", "; ".join(removed.get(row.variant, ())),
                megabytes(row), f"{row.extra['loss']:.3f}",
            )
            for row in rows
        ],
    )  # fmt: skip
    names = [row.variant.removeprefix("+ ") for row in rows]
    left = [name for name in names if name in ("torch.compile", "activation checkpointing")]
    tried = f" {' and '.join(left)}: tried and left again." if left else ""
    return table + (
        "\nRatios are taken within rounds, not of the medians beside them."
        f" The gains multiply to {section['product_of_steps']:.2f}×, first against last is "
        f"{section['total']:.2f}×; ops account for {section['profile']['accounted']:.0%} of the last step."
        f"{tried}\n"
    )


def line_of(removal: str, lines: Sequence[str]) -> str:
    """The line of a ladder of which `removal` is the whole or a part. Raises UserError when there is none."""
    found = [line for line in lines if line == f"+ {removal}"]
    if removal in BEGINS:
        found += [line for line in lines if line.startswith(BEGINS[removal])]
    if not found:
        raise UserError(f"'without {removal}' is no part of a line of the ladder: {', '.join(lines)}")
    return found[0]


def _gain(ratio: float, error: float | None) -> str:
    return f"{ratio:.2f}×" + ("" if error is None else f" ±{ratio * error:.2f}")


def megabytes(row: Row) -> str:
    peak = row.extra.get("peak_memory_bytes")
    return "" if peak is None else f"{peak / 1e6:,.0f} MB"


def peers(results: Results) -> str:
    """A step of other trainers beside ours, one table for each model, and which were not measured."""
    rows = chosen(results, "peers ")
    table = "\n".join(
        _peers([row for row in rows if row.subject == subject])
        for subject in dict.fromkeys(row.subject for row in rows)
    )
    skipped = results.content.get("skipped_peers", ())
    return table + "".join(f"\nNot measured: {reason}.\n" for reason in skipped)


def _peers(rows: Sequence[Row]) -> str:
    """Ours comes first; a peer that starts from weights of its own has another loss, which is not shown."""
    return markdown(
        (_heading(rows[0]).removeprefix("peers "), "step", "tokens/s", "ours is faster by", "loss"),
        [
            (
                row.variant, f"{row.median_ms:.0f} ms", f"{row.extra['tokens_per_second']:,.0f}",
                "" if row is rows[0] else _gain(1 / _speed_up(row), row.extra.get("ratio_error")),
                f"{row.extra['loss']:.3f}" if "loss" in row.extra else "",
            )
            for row in rows
        ],
    )  # fmt: skip


def removal(results: Results) -> str:
    rows = chosen(results, "removal")
    return markdown(
        ("all of them, and all but one", "step", "slower by"),
        [
            (row.variant, f"{row.median_ms:.0f} ms", f"{1 / next(iter(row.ratio_vs.values())):.2f}×")
            for row in rows
        ],
    )


def ops(results: Results) -> str:
    """Ours beside the baseline, one line for each op and shape."""
    rows = [
        row
        for row in results.rows
        if not row.subject.startswith(NOT_OPS) and row.variant != next(iter(row.ratio_vs))
    ]
    return markdown(
        ("op", "shape", "variant", "median", "speed-up", "of the ceiling"),
        [
            (
                f"{row.subject} {row.dtype}", row.shape, f"{row.variant} / {next(iter(row.ratio_vs))}",
                f"{row.median_ms:.2f} ms", f"{next(iter(row.ratio_vs.values())):.2f}×",
                f"{row.fraction_of_ceiling:.0%} of {row.ceiling}",
            )
            for row in rows
        ],
    )  # fmt: skip


def summary(results: Results) -> str:
    """One line for each op: the range of its speed-up over all shapes; of the ceiling, what it reaches at the
    shape that takes PyTorch longest."""
    by_op: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    baseline = 0.0
    for row in results.rows:
        if row.subject.startswith(NOT_OPS):
            continue
        if row.variant in row.ratio_vs:
            baseline = row.median_ms
        elif row.variant == "tapelm":
            by_op.setdefault(row.subject, {}).setdefault(row.dtype, []).append((baseline, row))
    lines = []
    for op, dtypes in by_op.items():
        cells = [cell for dtype in ("bfloat16", "float32") for cell in _in_summary(dtypes.get(dtype, []))]
        ceiling = (
            "GEMM" if any("GEMM" in row.ceiling for found in dtypes.values() for _, row in found) else "copy"
        )
        lines.append((op, *cells, ceiling))
    return markdown(
        ("op", "bf16", "of the ceiling", "float32", "of the ceiling", "which ceiling"),
        lines,
    )


def _in_summary(rows: Sequence[tuple[float, Row]]) -> tuple[str, str]:
    """Rows of one op and dtype, each after its baseline's time."""
    if not rows:
        return "", ""
    ratios = sorted(_speed_up(row) for _, row in rows)
    ends = list(dict.fromkeys(_times(ratio) for ratio in (ratios[0], ratios[-1])))
    longest = max(rows, key=lambda timed: timed[0])[1]
    return " to ".join(ends) + "×", f"{longest.fraction_of_ceiling:.0%}"


def _times(ratio: float) -> str:
    digits = 2 if ratio < 2 else 1 if ratio < 10 else 0
    return f"{ratio:.{digits}f}"


def generation(results: Results) -> str:
    """Reading a prompt, and a further token of each variant."""
    prefill = {row.variant: row for row in chosen(results, "prefill ")}
    decode = {row.variant: row for row in chosen(results, "decode ")}
    first = next(iter(prefill.values()))
    name = first.subject.removeprefix("prefill ")
    return markdown(
        (
            f"{name}, {first.shape} tokens", "prompt", "a further token", "tokens/s", "speed-up",
            "of the copy bandwidth",
        ),
        [
            (
                variant, f"{prefill[variant].median_ms:.1f} ms", f"{row.median_ms:.2f} ms",
                f"{row.extra['tokens_per_second']:,.0f}", f"{_speed_up(row):.1f}×",
                f"{row.fraction_of_ceiling:.0%}",
            )
            for variant, row in decode.items()
        ],
    )  # fmt: skip


def tokenizer(results: Results) -> str:
    """Passes in MB/s; loading and training in seconds."""
    first = chosen(results, "cold")
    peers = list(dict.fromkeys(row.variant for row in first))
    lines = []
    for subject in dict.fromkeys(row.subject for row in results.rows):
        if not subject.startswith(("load,", "cold", "warm", "merges")):
            continue
        by_peer = {row.variant: row for row in results.rows if row.subject == subject}
        timed = subject.startswith(("load", "merges"))
        cells = [_cell(by_peer.get(peer), timed) for peer in peers]
        lines.append((subject.replace(" thr", " thread") + (", ms" if timed else ", MB/s"), *cells))
    return markdown((first[0].shape, *peers), lines)


def _cell(row: Row | None, timed: bool) -> str:
    if row is None:
        return ""
    number = row.median_ms if timed else row.extra["megabytes_per_second"]
    return f"{number:,.1f}" if number < 10 else f"{number:,.0f}"


def loader(results: Results) -> str:
    """Batches, opening and files to shards, ours beside what it is compared with."""
    rows = [row for row in results.rows if row.subject in ("loader", "open", "encode_files")]
    return markdown(
        ("", "median", "speed-up", "of the copy bandwidth"),
        [
            (
                f"{row.subject} {row.shape}: {row.variant}",
                _duration(row),
                "" if row.variant in row.ratio_vs else f"{_speed_up(row):.2f}×",
                _of_ceiling(row) if row.subject == "loader" else "",
            )
            for row in rows
        ],
    )


def _of_ceiling(row: Row) -> str:
    return f"{row.fraction_of_ceiling:.0%}" + ("!" if row.fraction_of_ceiling > 1 else "")


def _duration(row: Row) -> str:
    """Of one batch, where a row has many: its shape begins with their number."""
    if row.subject != "loader":
        return f"{row.median_ms:,.2f} ms"
    return f"{1e3 * row.median_ms / int(row.shape.split(' x ')[0]):,.1f} µs"


def scaling(results: Results) -> str:
    """Exponents of a step's cost, and how far the planner was off on shapes that it was not fitted to."""
    plan = results.content["plan"]
    errors = plan.get("exponent_errors", {})  # older files have none
    exponents = [
        (name.replace("_", " "), f"{power:.2f}" + (f" ±{errors[name]:.2f}" if name in errors else ""))
        for name, power in plan["exponents"].items()
    ]
    held_out = [(name, f"{100 * error:+.0f}%") for name, error in plan["held_out_errors"].items()]
    return (
        markdown(
            ("a step's time goes with", "to the power" + (", ± standard error" if errors else "")), exponents
        )
        + "\n"
        + markdown(("not fitted: batch x T x C x layers x heads x vocabulary", "predicted"), held_out)
    )


KINDS: dict[str, Callable[[Results], str]] = {
    "steps": steps, "hf": hf, "ladder": ladder, "removal": removal, "peers": peers, "ops": ops,
    "summary": summary, "generation": generation, "tokenizer": tokenizer, "loader": loader, "texts": texts,
    "forecasts": forecasts, "scaling": scaling,
}  # fmt: skip

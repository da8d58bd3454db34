"""python -m benchmarks all: what takes minutes, in one run, with its report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks import (
    compare,
    generate,
    harness,
    ladder_report,
    llama_rungs,
    loader,
    page,
    peers,
    sweeps,
    tokenizer,
)
from benchmarks.commands.timed import (
    SMOLLM2,
    Flag,
    Generate,
    Loader,
    Measuring,
    alone,
    cases_of,
    fetched,
    report_failed,
)
from benchmarks.harness import Row
from benchmarks.ladder import Request
from gpt.cli import UserError, prepare_output
from gpt.config import preset

LEAST_OPS_ROUNDS = 3
"""One in each sweep, which is all that is taken of what is slow."""
FEWER_ROUNDS = 5
"""Of what takes long."""
FEWER_TOKENS = 32
"""Generated after a prompt, which halves what a round takes."""


class Gathered:
    """What was measured so far, written after every part, so that an interruption costs one."""

    def __init__(self, path: Path | None, device: torch.device, swept: sweeps.Sweeps) -> None:
        self.path, self.device, self.swept = path, device, swept
        self.rows: list[Row] = []
        self.printed: list[Row] = []
        """In tables of their own."""
        self.unfinished: list[Row] = []
        """Of a ladder of which parts are still to come."""
        self.seconds: dict[str, float] = {}
        self.sections: dict[str, Any] = {"seconds": self.seconds}
        self._started = time.monotonic()

    def save(self, part: str) -> None:
        lately = time.monotonic() - self._started - sum(self.seconds.values())
        self.seconds[part] = self.seconds.get(part, 0.0) + lately
        if self.path is not None:
            rows = [*self.swept.rows(), *self.rows, *self.printed, *self.unfinished]
            harness.write_results(self.path, self.device, rows, errors=self.swept.errors, **self.sections)

    def add_ladder(self, measurement: ladder_report.Measurement) -> None:
        climbed, section = measurement.finish()
        self.printed += climbed
        ladders = [*self.sections.get("ladders", []), section]
        self.sections["ladders"] = sorted(ladders, key=lambda ladder: ladder["title"])


@dataclass(frozen=True)
class All(Measuring):
    """Ops, the ladders of both models, peers, generation, tokenizer, loader; --out takes the report."""

    name: ClassVar[str] = "all"
    rounds: int | None = None  # type: ignore[assignment]
    """None takes 3 for ops and more for quick ones, 5 for peers, generation and loader, 9 for the tokenizer,
    and for ladders those that begin within 36 seconds, from 3 to 9. Ops and GPT's ladder are taken in
    three parts, which rounds them up."""
    out: Path | None = None
    """A directory for results.json, index.html and tables.md."""
    preset: str = "seed"
    """Of the training steps and the generation."""
    batch_size: int | None = None
    """Windows (sequences) in a step or batch; None takes 4, and 16 for the loader."""
    no_compiled: Flag = False
    """Leave out torch.compile, which takes a minute to compile."""
    only: str = ""
    """Only ops whose name contains this."""
    data: Path | None = None
    """GPT's ladder: a directory of data.prepare; None takes this repository's own text."""
    base: Path = SMOLLM2
    """Llama's ladder: a local Llama model; SmolLM2-135M is fetched there if there is none."""
    text: Path | None = None
    """Tokenizer and loader: a .txt or .jsonl(.gz) file, or a directory of them."""
    llmc: Path | None = None
    """Peers: a checkout of llm.c with its train_gpt2 built."""

    def run(self) -> int:
        if self.out is not None and self.json is not None:
            raise UserError("--out writes results.json there: leave out --json")
        device = self.begin()
        swept = sweeps.Sweeps(cases_of(device, self.only), device, self.rounds or LEAST_OPS_ROUNDS)
        path = self.json if self.out is None else self.out / "results.json"
        if path is not None:
            prepare_output(path)
        self._measure(Gathered(path, device, swept), device)
        if self.out is not None:
            print(f"wrote {page.write(compare.read(self.out / 'results.json'), self.out)}")
        return report_failed(swept)

    def _measure(self, found: Gathered, device: torch.device) -> None:
        """Ops and GPT's ladder in three parts, the others between them: the parts lie minutes apart."""
        found.swept.sweep()
        found.save("ops")
        request = Request(self.preset, self.batch_size or 4, device, self.data, not self.no_compiled)
        gpt_ladder = ladder_report.Measurement("gpt", request, self.rounds, sweeps.SWEEPS)
        found.unfinished = gpt_ladder.part()
        found.save("ladder of gpt")
        try_llama_ladder(self.base, device, self.rounds, found.add_ladder)
        found.save("ladder of llama")
        found.unfinished = gpt_ladder.part()
        found.save("ladder of gpt")
        found.swept.sweep()
        found.save("ops")
        measured, skipped = peers.measure(
            self.preset, self.batch_size or 4, device, self.rounds or FEWER_ROUNDS,
            compiled=not self.no_compiled, llmc=self.llmc,
        )  # fmt: skip
        found.rows += measured
        found.sections["skipped_peers"] = skipped
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        found.save("peers")
        found.rows += try_generation(self.preset, device, self.rounds or FEWER_ROUNDS)
        found.save("generation")
        if self.text is None and not tokenizer.CORPORA.is_dir():
            print("skipped: tokenizer: no text here, give --text a .txt or .jsonl file")
        else:
            found.rows += alone(tokenizer.measure, self.text, self.rounds or harness.ROUNDS)
            found.save("tokenizer")
        found.add_ladder(gpt_ladder)
        found.unfinished = []
        found.save("ladder of gpt")
        found.rows += alone(
            loader.measure_all,
            self.rounds or FEWER_ROUNDS,
            self.preset,
            self.batch_size or Loader.batch_size,
            self.text,
        )
        found.save("loader")
        found.swept.sweep_all()
        harness.report("python -m benchmarks all", [*found.swept.rows(), *found.rows], device)
        found.save("ops")
        parts = ", ".join(f"{part} {took / 60:.1f}" for part, took in found.seconds.items())
        print(f"minutes: {sum(found.seconds.values()) / 60:.1f}; {parts}")


def try_generation(name: str, device: torch.device, rounds: int) -> list[Row]:
    """With random weights; where it cannot be measured, says why, but for wrong tokens."""
    prompt = min(Generate.prompt_tokens, preset(name, data=Path(), out=Path()).block_size // 2)
    try:
        rows, skipped = generate.measure(None, name, prompt, FEWER_TOKENS, device, rounds)
    except harness.WrongResult:
        raise
    except UserError as error:
        rows, skipped = [], [str(error)]
    print("".join(f"skipped: generation: {line}\n" for line in skipped), end="")
    return rows


def try_llama_ladder(
    base: Path, device: torch.device, rounds: int | None, add: Callable[[ladder_report.Measurement], None]
) -> None:
    """Says why where it cannot be measured; that it computes something wrong is an error all the same."""
    try:
        request = Request("", llama_rungs.BATCH_SIZE, device, base=fetched(base))
        add(ladder_report.Measurement("llama", request, rounds))
    except harness.WrongResult:
        raise
    except UserError as error:
        print(f"skipped: ladder of llama: {error}")

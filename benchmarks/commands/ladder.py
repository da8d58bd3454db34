"""python -m benchmarks ladder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from benchmarks import kept_memory, ladder_report
from benchmarks.commands.timed import SMOLLM2, Flag, Measuring, fetched
from benchmarks.ladder import Request
from gpt.cli import UserError, prepare_output


@dataclass(frozen=True)
class Ladder(Measuring):
    """The training step with one optimization more on every line, and with one removed.

    With --model llama: what each technique does to a fine-tuning, by whole runs.
    """

    name: ClassVar[str] = "ladder"
    rounds: int | None = None  # type: ignore[assignment]
    """gpt: None takes as many as begin within 36 seconds, from 3 to 9."""
    model: Literal["gpt", "llama"] = "gpt"
    data: Path | None = None
    """A directory of data.prepare; None takes this repository's own text, for llama runs/corpus."""
    preset: str = "seed"
    """gpt: of the training step."""
    batch_size: int = 4
    """gpt: windows (sequences) in a step."""
    no_compiled: Flag = False
    """gpt: leave out torch.compile, which takes a minute to compile."""
    base: Path = SMOLLM2
    """llama: a local Llama model; SmolLM2-135M is fetched there if there is none."""
    out: Path = Path("runs/ladder")
    """llama: the runs go here; those of the same model, data and steps are not taken again."""
    steps: int = 30
    """llama: optimizer steps of each run."""
    sweeps: Flag = False
    """llama: also sweep batch size and rank."""

    OF_MODEL: ClassVar[dict[str, tuple[str, ...]]] = {
        "gpt": ("rounds", "device", "threads", "preset", "batch_size", "no_compiled"),
        "llama": ("base", "out", "steps", "sweeps"),
    }
    """Options that say nothing to the other model."""

    def run(self) -> int:
        other = "llama" if self.model == "gpt" else "gpt"
        default = Ladder()
        for name in self.OF_MODEL[other]:
            if getattr(self, name) != getattr(default, name):
                raise UserError(f"--{name.replace('_', '-')} means nothing to the ladder of {self.model}")
        if self.model == "llama":
            return self._fine_tune()
        device = self.begin()
        request = Request(self.preset, self.batch_size, device, self.data, not self.no_compiled)
        rows, section = ladder_report.Measurement("gpt", request, self.rounds).finish()
        return self.finish([], device, rows, ladders=[section])

    def _fine_tune(self) -> int:
        from benchmarks import llama_ladder
        from llama_lora.dataset import find_split

        data = self.data or Path("runs/corpus")
        for split in ("train", "val"):
            find_split(data, split)
        for path in (self.json, self.out / "ladder.json"):
            if path is not None:
                prepare_output(path)
        with kept_memory.given_back():  # to runs that are those of a user
            return llama_ladder.run(
                fetched(self.base), data, self.out, self.steps,
                sweeps=self.sweeps, json_path=self.json,
            )  # fmt: skip

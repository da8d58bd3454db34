"""python -m benchmarks hf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.commands.timed import Measuring


@dataclass(frozen=True)
class Hf(Measuring):
    """The training step of a model of transformers, stock, with our modules, and on GPUs with Liger."""

    name: ClassVar[str] = "hf"
    model: Path | None = None
    """A directory with a model of transformers, for its sizes; if not given, a Llama as wide as SmolLM2."""
    layers: int | None = None
    """As many as the model has; 6 if none is given."""
    batch_size: int = 4
    """Windows (sequences) in a step."""
    length: int = 512
    """Tokens of a window."""

    def run(self) -> int:
        from benchmarks import hf

        device = self.begin()
        config = hf.config_of(self.model, self.layers)
        rows, skipped = hf.measure(config, self.batch_size, self.length, device, self.rounds)
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        return self.finish(rows, device, skipped_peers=skipped)

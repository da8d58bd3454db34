"""python -m benchmarks hf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from benchmarks.commands.timed import Measuring


@dataclass(frozen=True)
class Hf(Measuring):
    """The training step of a Llama of transformers, stock, with our modules, and on GPUs with Liger."""

    name: ClassVar[str] = "hf"
    layers: int = 6
    """Of a model as wide as SmolLM2-135M, which has 30."""
    batch_size: int = 4
    """Windows (sequences) in a step."""
    length: int = 512
    """Tokens of a window."""

    def run(self) -> int:
        from benchmarks import hf

        device = self.begin()
        rows, skipped = hf.measure(self.layers, self.batch_size, self.length, device, self.rounds)
        print("".join(f"skipped: {line}\n" for line in skipped), end="")
        return self.finish(rows, device, skipped_peers=skipped)

"""Subjects that time nothing on this machine, or only what a GPU needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import compare, gpu_check, models, planner, static, static_peers, tune
from benchmarks.commands.timed import Flag
from gpt.cli import UserError, prepare_output


@dataclass(frozen=True)
class Plan:
    """Step time, memory and cost of a preset on GPUs, from the roofline; measures nothing."""

    measured: tyro.conf.Positional[Path | None] = None
    """A file of `scaling --json`; else the newest committed."""
    preset: str = "seed"
    """Of gpt.train: demo, seed, finance, tape or gpt2."""
    batch_size: int | None = None
    """Windows (sequences) in a pass; None takes the preset's."""
    gpu: str = "H100"
    """A100, A10G, L40S, H100, B200 or MI300X."""
    gpus: int = 1
    """How many."""
    dollars: float | None = None
    """Price of an hour of one GPU."""
    tokens: float = 1e10
    """Tokens of the whole training."""

    def run(self) -> int:
        return planner.run(
            self.measured, self.preset, self.batch_size, self.gpu, self.gpus, self.dollars, self.tokens
        )


@dataclass(frozen=True)
class Models:
    """A table of run directories of gpt and llama_lora on the same held-out text."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Such as runs/demo/plain."""
    out: Path | None = None
    """A directory for models.md."""

    def run(self) -> int:
        return models.run(self.runs, self.out)


@dataclass(frozen=True)
class Compare:
    """Two JSON files of one machine: which ratios changed by more than their noise."""

    before: tyro.conf.Positional[Path]
    now: tyro.conf.Positional[Path]

    def run(self) -> int:
        return compare.run(self.before, self.now)


@dataclass(frozen=True)
class Static:
    """Compiles every Triton kernel for every target, no GPU needed, and writes the lock file."""

    check: Flag = False
    """Change nothing, fail when what compiles now differs from the lock file."""
    seconds: float = float("inf")
    """Start no compilation after so many; run it again for the rest."""
    peers: Flag = False
    """Compile other libraries' kernels instead, where installed, beside ours."""
    tutorial: Path | None = None
    """With --peers: python/tutorials/06-fused-attention.py of a checkout of Triton."""

    def run(self) -> int:
        if self.peers and (self.check or self.seconds != Static.seconds):
            raise UserError("--peers compares all and checks nothing: leave out --check and --seconds")
        if self.peers:
            static_peers.report(self.tutorial)
            return 0
        if self.tutorial is not None:
            raise UserError("--tutorial needs --peers")
        return static.run(self.check, self.seconds)


@dataclass(frozen=True)
class Tune:
    """Measures launch configurations on the GPU at hand and writes the table that the library reads."""

    only: str = ""
    """Only kernels whose name contains this."""
    json: Path | None = None
    """Write the table here, for `tapelm.use_table`, instead of into the library."""
    seconds: float = float("inf")
    """Take no kernel after so many, leaving the rest as they ship."""

    def run(self) -> int:
        if self.json is not None:
            prepare_output(self.json)
        return tune.run(self.only, self.json, self.seconds)


@dataclass(frozen=True)
class GpuCheck:
    """Everything that needs a GPU: tests on the device, ops and train."""

    def run(self) -> int:
        return gpu_check.run()

"""The whole story in one command: python -m gpt.demo --out runs/demo

Prepares the data, trains the plain and the optimized GPT, evaluates both, generates a sample from each and
writes report.json and report.html. A second call skips what is done and goes on where the first one stopped.

Every stage is a process of its own: peak memory is that of the stage, and a failure stops the demo cleanly.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from gpt.cli import UserError, parse_options, run_program, write_atomically
from gpt.config import PRESETS, preset
from gpt.hardware import pick_device, set_threads
from gpt.resume import program_of


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Prepares data, trains the plain and the optimized GPT, evaluates both and writes report.html.

    What was done is not done again; --force does everything anew.
    """

    out: Path = Path("runs/demo")
    """Directory of both runs, the data and the report."""
    preset: str = "demo"
    """That of both trainings; python -m gpt.train --help describes them."""
    data: Path | None = None
    """A prepared data directory; without one, the default corpus is prepared in OUT/data."""
    max_steps: int | None = None
    """Steps of both trainings; None takes the preset's."""
    prompt: str = "The economy"
    """What both models continue at the end."""
    max_new_tokens: int = 120
    """Length of the samples."""
    evaluate_bytes: int = 50_000
    """Text evaluated in each domain, in bytes; 0 takes the whole validation split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    force: bool = False
    """Do everything again."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, the files that decide whether it has to run again, and what it leaves behind."""

    name: str
    module: str
    arguments: list[str]
    inputs: list[Path]
    output: Path
    settings: str = ""
    """Anything else the output depends on."""
    restart: Path | None = None
    """Removed before a first run with these inputs; kept to be resumed after an interruption."""

    def key(self) -> str:
        """SHA-256 of the command and of the contents of the inputs."""
        digest = hashlib.sha256(repr((self.module, self.arguments, self.settings)).encode())
        for path in self.inputs:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def run(self, stamps: Path, console: Console, *, force: bool) -> None:
        """Run the command unless the same one finished before; stamps/NAME.json remembers key and seconds.

        Ends the program with the command's status if it fails.
        """
        stamp, key = stamps / f"{self.name}.json", self.key()
        before = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
        same = before.get("key") == key and not force
        if same and before.get("done") and self.output.is_file():
            console.print(f"[bold]{self.name}[/] done before, {self.output}")
            return
        if not same and self.restart is not None and self.restart.exists():
            if not before:
                raise UserError(f"{self.restart} was not made by this demo: choose another --out")
            shutil.rmtree(self.restart)
        if not same:
            write_atomically(stamp, json.dumps({"key": key, "done": False, "seconds": 0.0}))
        command = [sys.executable, "-m", self.module, *self.arguments]
        said = f"{program_of(self.module)} {shlex.join(self.arguments)}"
        console.print(f"[bold]{self.name}[/] {said}", soft_wrap=True)
        started = time.perf_counter()
        status = run_to_end(command)
        seconds = before.get("seconds", 0.0) if same else 0.0
        seconds += time.perf_counter() - started
        write_atomically(stamp, json.dumps({"key": key, "done": status == 0, "seconds": seconds}))
        if status:
            console.print(f"{self.name} ended with status {status}; the same command goes on from here")
            sys.exit(status if status > 0 else 128 - status)
        console.print(f"[bold]{self.name}[/] took {seconds:.0f} s")


def run_to_end(command: list[str]) -> int:
    """Exit status of the command.

    Ctrl-C reaches it from the terminal and SIGTERM is passed on; a training then ends with a checkpoint.
    """
    process = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)


def code_sha256() -> str:
    """SHA-256 of the code that the results come from: the modules and libraries of gpt and tapelm."""
    tapelm = importlib.util.find_spec("tapelm")
    if tapelm is None or tapelm.origin is None:
        raise UserError("the package tapelm is not installed: run make setup")
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(tapelm.origin).parent):
        for path in sorted((*folder.glob("*.py"), *folder.glob("*.so"))):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def stages_after_data(config: DemoConfig, data: Path) -> list[Stage]:
    code = code_sha256()
    shared = ["--device", config.device, "--threads", str(config.threads)]
    tokens = [data / "tokenizer.json", data / "train" / "manifest.json", data / "val" / "manifest.json"]
    stages, results = [], []
    for kernels in ("plain", "optimized"):
        run = config.out / kernels
        arguments = ["--preset", config.preset, "--kernels", kernels, "--data", str(data), "--out", str(run)]
        if config.max_steps is not None:
            arguments += ["--max-steps", str(config.max_steps)]
        stages.append(
            Stage(
                name=f"train-{kernels}",
                module="gpt.train",
                arguments=[*arguments, "--resume", "auto", *shared],
                inputs=tokens,
                output=run / "summary.json",
                settings=repr(PRESETS[config.preset]) + code,
                restart=run,
            )
        )
    for kernels in ("plain", "optimized"):
        run = config.out / kernels
        of_run = ["--checkpoint", str(run)]
        evaluation, sample = run / "evaluation.json", run / "sample.json"
        limits = ["--max-bytes", str(config.evaluate_bytes), "--json", str(evaluation)]
        length = ["--max-new-tokens", str(config.max_new_tokens), "--json", str(sample)]
        stages += [
            Stage(
                name=f"evaluate-{kernels}",
                module="gpt.evaluate",
                arguments=[*of_run, "--data", str(data), *limits, *shared],
                inputs=[run / "summary.json"],
                output=evaluation,
                settings=code,
            ),
            Stage(
                name=f"generate-{kernels}",
                module="gpt.generate",
                arguments=[*of_run, "--prompt", config.prompt, *length, *shared],
                inputs=[run / "summary.json"],
                output=sample,
                settings=code,
            ),
        ]
        results += [run / "summary.json", evaluation, sample]
    runs = ["--plain", str(config.out / "plain"), "--optimized", str(config.out / "optimized")]
    report = Stage(
        name="report",
        module="gpt.report",
        arguments=[*runs, "--out", str(config.out)],
        inputs=results,
        output=config.out / "report.html",
    )
    return [*stages, report]


def main(arguments: list[str]) -> int:
    config = parse_options(DemoConfig, arguments, prog="python -m gpt.demo")
    if config.preset not in PRESETS:
        raise UserError(f"unknown preset {config.preset!r}; choose one of: {', '.join(PRESETS)}")
    for name in ("max_new_tokens", "evaluate_bytes"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative, got {getattr(config, name)}")
    data = config.data or config.out / "data"
    # What a stage would refuse is refused before anything of an earlier call is removed.
    steps = {} if config.max_steps is None else {"max_steps": config.max_steps}
    preset(config.preset, data=data, out=config.out, **steps)
    pick_device(config.device)
    set_threads(config.threads)
    console = Console(stderr=True, highlight=False)
    stamps = config.out / "stages"
    stamps.mkdir(parents=True, exist_ok=True)
    console.print("data, train plain, train optimized, evaluate, generate, report: minutes on two cores")
    if config.data is None:
        prepare = ["--source", "packages", "--out", str(data)]
        output = data / "data_card.json"
        Stage("data", "data.prepare", prepare, [], output).run(stamps, console, force=config.force)
    for stage in stages_after_data(config, data):
        # The report is cheap, and it prints the table that the demo ends with.
        stage.run(stamps, console, force=config.force or stage.name == "report")
    written = sorted(stamps.glob("*.json"), key=lambda path: path.stat().st_mtime)
    spent = {path.stem: json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in written}
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items())
    console.print(f"{sum(spent.values()):.0f} s in all: {parts}", soft_wrap=True)
    console.print(f"open {config.out / 'report.html'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_program(main)

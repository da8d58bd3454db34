"""Train a GPT: python -m gpt.train --preset demo --kernels optimized --data DIR --out RUN [--resume auto]

RUN/metrics.jsonl gets a line for every step, RUN/summary.json the result, RUN/loss.png the plot,
RUN/checkpoints/ the weights.

Ctrl-C (or SIGTERM) finishes the current step, writes a checkpoint and says how to go on. Under torchrun
several processes train together, see gpt/parallel.py.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import contextlib
import json

from rich.console import Console

from gpt import parallel
from gpt.cli import StopRequest, UserError, only_writer, run_program, write_atomically
from gpt.config import TrainConfig, parse_command_line
from gpt.metrics import (
    add_scalars,
    append_record,
    check_finite,
    keep_up_to,
    open_tensorboard,
    read_records,
    risen,
    summary_is_of,
)
from gpt.parallel import Ranks
from gpt.progress import TrainingProgress, plot, validation_text
from gpt.resume import choose_checkpoint, launched_by, program_of, resume_command
from gpt.session import Training


def train(config: TrainConfig, arguments: list[str] | None = None) -> int:
    """Run the whole training; returns 0 when done and 130 or 143 after a checkpoint forced by a signal.

    Raises UserError for input that cannot be trained on, OSError when the disk is full.
    """
    with parallel.joined(config.device) as ranks:
        if ranks.size > 1 and config.compile and config.parallel == "fsdp":
            raise UserError("--compile is not supported with --parallel fsdp: leave one of them")
        with only_writer(config.out) if ranks.leads else contextlib.nullcontext():
            return _train(config, ranks, arguments)


def _train(config: TrainConfig, ranks: Ranks, arguments: list[str] | None) -> int:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not ranks.leads)
    run = Training(config, ranks)
    start = ranks.of_leader(lambda: choose_checkpoint(config))
    if start is not None:
        run.resume(start, console)
    elif config.initialize_from is not None:
        run.take_weights(config.initialize_from, console)
    console.print(f"{run}" + (f", resumed from {start}" if start else ""))
    if config.warmup_steps >= run.total_steps > run.step:
        console.print(
            f"warning: the warmup of {config.warmup_steps} steps does not end within the run (--warmup-steps)"
        )
    if (ids := run.tokenizer.vocab_size) < 0.9 * run.shape.vocab_size:
        console.print(
            f"warning: of {run.shape.vocab_size:,} ids that the model has, the tokenizer has {ids:,}: "
            "with --vocab-size 0 the model is made without the others"
        )
    run.start_clock()
    metrics_path = config.out / "metrics.jsonl"
    if ranks.leads:
        keep_up_to(metrics_path, run.step)
    tensorboard = open_tensorboard(config.out) if ranks.leads else None
    resumed_at, total = run.step, run.total_steps
    last = total if config.stop_after is None else min(total, run.step + config.stop_after)

    with StopRequest() as stop, TrainingProgress(console, total, run.step) as progress:
        while run.step < last:
            record = run.take_step()
            if run.step % config.eval_interval == 0 or run.step == last:
                record["val_loss"] = run.validate()
            if ranks.leads:  # its end is that of the others
                check_finite(record)
            record["seconds"] = run.count(record)
            if ranks.leads:
                append_record(metrics_path, record)
            add_scalars(tensorboard, record)
            progress.show(record)
            signal = int(ranks.largest(stop.signal or 0))
            if signal or run.step % config.checkpoint_interval == 0 or run.step == last:
                saved = run.save()
            if signal and run.step < last:
                program = program_of("gpt.train") if ranks.size == 1 else launched_by(arguments)
                command = resume_command(program, arguments)
                console.print(f"stopped after step {run.step}, saved {saved}; go on with: {command}")
                return 128 + signal

    done = ranks.of_leader(lambda: summary_is_of(config.out / "summary.json", run.step))
    if run.step == resumed_at and done:
        console.print(f"nothing left to do: {start} is already at step {run.step} of {total}")
        return 0
    summary = run.summary()
    if ranks.leads:
        write_atomically(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        records = read_records(metrics_path)
        write_atomically(config.out / "loss.png", plot({"": records}))
        # A tape of numbers has no bytes of text.
        bits = "" if run.tape else f", {summary['val_bits_per_byte']:.3f} bits per byte"
        console.print(
            f"{run.step} steps: train loss {summary['train_loss']:.4f} "
            f"(mean of the last {min(20, run.step)}), "
            f"{validation_text(summary['val_loss'])}{bits}, "
            f"{summary['tokens_per_second']:,.0f} tokens/s (median); "
            f"wrote {config.out}: summary.json, metrics.jsonl, loss.png, checkpoints/"
        )
        if warning := risen(records):
            console.print(warning)
    return 0


def main(arguments: list[str]) -> int:
    return train(parse_command_line(arguments), arguments)


if __name__ == "__main__":
    run_program(main)

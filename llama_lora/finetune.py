"""Fine-tune a Llama model: python -m llama_lora.finetune --model DIR --data DIR --out RUN [--resume auto]

RUN/adapter/ is a PEFT directory with the tokenizer (RUN/model/ a whole model with --method full), that of the
best evaluation. RUN/metrics.jsonl has a line for every step, the first one being the evaluation of the base
model; RUN/summary.json the result, RUN/loss.png the plot, RUN/checkpoints/ what a killed run goes on from.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

from pathlib import Path

from rich.console import Console

from gpt.cli import StopRequest, UserError, only_writer, run_program
from gpt.metrics import (
    add_scalars,
    append_record,
    check_finite,
    keep_up_to,
    open_tensorboard,
    summary_is_of,
)
from gpt.parallel import several_processes
from gpt.progress import TrainingProgress, validation_text
from gpt.resume import choose_checkpoint, program_of, resume_command
from llama_lora.config import FinetuneConfig, parse_command_line
from llama_lora.results import finish
from llama_lora.session import Finetuning


def finetune(config: FinetuneConfig, arguments: list[str] | None = None) -> int:
    """Run the whole fine-tuning; returns 0 when done and 130 or 143 after a checkpoint forced by a signal.

    Raises UserError for input that cannot be trained on, OSError when the disk is full.
    """
    if several_processes():
        raise UserError("llama_lora.finetune trains in one process: start it without torchrun")
    with only_writer(config.out):
        return _finetune(config, arguments)


def _finetune(config: FinetuneConfig, arguments: list[str] | None) -> int:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    metrics_path = config.out / "metrics.jsonl"
    start = choose_checkpoint(config)
    run = Finetuning(config)
    if start is not None:
        run.resume(start)
        if run.ended and summary_is_of(config.out / "summary.json", run.step):
            console.print(f"nothing left to do: {start} is already at step {run.step} of {run.total_steps}")
            return 0
    run.verify(console)
    keep_up_to(metrics_path, run.step if start else -1)
    console.print(f"{run}" + (f", resumed from {start}" if start else ""))
    tensorboard = open_tensorboard(config.out)
    run.start_clock()
    if start is None:
        append_base(run, metrics_path, console)
    total = run.total_steps
    last = total if config.stop_after is None else min(total, run.step + config.stop_after)

    with StopRequest() as stop, TrainingProgress(console, total, run.step) as progress:
        while run.step < last and not run.ended:
            record = run.take_step()
            check_finite(record)
            if run.step % run.eval_interval == 0 or run.step == last:
                record["val_loss"] = run.evaluate()
                check_finite(record)
            record["seconds"] = run.count_seconds()
            append_record(metrics_path, record)
            add_scalars(tensorboard, record)
            progress.show(record)
            ends = run.step == last or run.ended
            if stop.signal is not None or run.step % config.checkpoint_interval == 0 or ends:
                saved = run.save()
            if stop.signal is not None and not ends:
                command = resume_command(program_of("llama_lora.finetune"), arguments)
                console.print(f"stopped after step {run.step}, saved {saved}; go on with: {command}")
                return 128 + stop.signal
    finish(config, run.dtype, run.device, run.model, run.trained, run.peak_memory, console)
    return 0


def append_base(run: Finetuning, metrics_path: Path, console: Console) -> None:
    """Evaluate the base model and make it the first line of the metrics."""
    console.print("step 0: evaluating the base model")
    record = {"step": 0, "val_loss": run.evaluate()}
    check_finite(record)
    console.print(f"step 0: {validation_text(record['val_loss'])}, the base model")
    append_record(metrics_path, record)


def main(arguments: list[str]) -> int:
    return finetune(parse_command_line(arguments), arguments)


if __name__ == "__main__":
    run_program(main)

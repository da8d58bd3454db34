"""Fine-tune a Llama model: python -m llama_lora.finetune --model DIR --data DIR --out RUN [--resume auto]

RUN/adapter/ is a PEFT directory with the tokenizer (RUN/model/ a whole model with --method full), that of the
best evaluation. RUN/metrics.jsonl has a line for every step, the first one being the evaluation of the base
model; RUN/summary.json the result, RUN/loss.png the plot, RUN/checkpoints/ what a killed run goes on from.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt.interrupt import end_quietly

    end_quietly()

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gpt import checkpoint
from gpt.cli import StopRequest, UserError, only_writer, run_program
from gpt.hardware import (
    forget_peak_memory,
    peak_memory_bytes,
    pick_device,
    set_threads,
    synchronize,
    versions,
)
from gpt.metrics import append_record, check_finite, keep_up_to, open_tensorboard
from gpt.parallel import several_processes
from gpt.progress import TrainingProgress, validation_text
from gpt.resume import choose_checkpoint, resume_command
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import Backend, get_backend, open_tokenizer
from llama_lora.config import FinetuneConfig, parse_command_line
from llama_lora.dataset import end_of_text, find_split, read_examples
from llama_lora.packing import PackedBatch, Rows
from llama_lora.results import check_same_run, finish, inputs, pick_dtype
from llama_lora.trained import Trained
from llama_lora.verify import verify


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
    set_threads(config.threads)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    checkpoints, metrics_path = config.out / "checkpoints", config.out / "metrics.jsonl"
    start = choose_checkpoint(config)
    backend = get_backend(config.backend)
    recipe = Recipe(config.method, config.rank, config.alpha, config.target_modules)
    model = backend.load(config.model, recipe, dtype, device)
    tokenizer = open_tokenizer(config.model)
    train, validation = (read_rows(config, tokenizer, split) for split in ("train", "val"))
    files.reset(backend.adapters(model), config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.verify:
        report = verify(backend, model, recipe, config.model, device)
        console.print(
            f"verified: leak {report.leak:.1e}, packed logits within {report.packed_error:.1e}, "
            f"least cosine of a gradient {report.cosine:.5f} ({report.worst or 'no adapters'})"
        )
    else:
        console.print("WARNING: --no-verify: packing, gradients and the adapter file are NOT checked")

    optimizer, read = backend.optimizer(model, config), inputs(config)
    trained = Trained(model)
    step, tokens, seconds, peak, best, waited = 0, 0, 0.0, 0, math.inf, 0
    if start is not None:
        check_same_run(config, dtype, start, read)
        state = checkpoint.restore(start, trained, optimizer)
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        peak, waited = state["peak_memory_bytes"], state["waited"]
        best = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
    keep_up_to(metrics_path, step if start else -1)

    rows_per_step = config.batch_size * config.accumulation_steps
    steps_per_epoch = max(1, -(-len(train) // rows_per_step))
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    eval_interval = config.eval_interval or steps_per_epoch
    console.print(
        f"{config.backend} {config.method} {str(dtype).removeprefix('torch.')}: "
        f"{sum(p.numel() for _, p in trained.named_parameters()):,} parameters train, steps {step} to "
        f"{total_steps} of {rows_per_step} rows of {config.block_size}, {train.tokens:,} tokens "
        f"({train.fill:.1%} of the rows)" + (f", resumed from {start}" if start else "")
    )
    last_step = total_steps if config.stop_after is None else min(total_steps, step + config.stop_after)
    tensorboard = open_tensorboard(config.out)
    run = Compiled(backend, model) if config.compile else backend
    forget_peak_memory(device)
    session_seconds, session_started = seconds, time.perf_counter()

    def record_evaluation(record: dict[str, Any]) -> None:
        """Evaluate, keep the adapter when it is the best so far, and count how long there was none."""
        nonlocal best, waited
        record["val_loss"] = evaluate_rows(
            backend, model, validation, config.batch_size, config.eval_rows, device
        )
        check_finite(record)
        improved = record["val_loss"] < best
        best, waited = min(best, record["val_loss"]), 0 if improved else waited + 1
        if improved and record["step"] > 0:
            trained.publish(config, backend, recipe, tokenizer)
        if record["step"] == 0:
            console.print(f"step 0: {validation_text(record['val_loss'])}, the base model")

    def save() -> Path:
        state = {
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "peak_memory_bytes": max(peak, peak_memory_bytes(device)),
            "best_val_loss": None if math.isinf(best) else best,
            "waited": waited,
            "precision": str(dtype),
            "threads": torch.get_num_threads(),
            "generators": checkpoint.generators(device),
            "config": config.as_json(),
            "inputs": read,
            "versions": versions(),
            "model": vars(trained.config),
        }
        tensors = checkpoint.tensors_of(trained, optimizer)
        tokenizer_file, keep = config.model / "tokenizer.json", config.keep_checkpoints
        return checkpoint.save(checkpoints, tensors, state, tokenizer=tokenizer_file, keep=keep)

    if start is None:
        record: dict[str, Any] = {"step": 0}
        record_evaluation(record)
        append_record(metrics_path, record)
    with StopRequest() as stop, TrainingProgress(console, total_steps, step) as progress:
        while step < last_step and not 0 < config.patience <= waited:
            synchronize(device)
            started = time.perf_counter()
            learning_rate = config.learning_rate_at(step, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss, new_tokens = training_step(run, model, optimizer, train, step, config, device)
            step_seconds = time.perf_counter() - started
            step, tokens = step + 1, tokens + new_tokens
            record = {
                "step": step,
                "loss": loss,
                "lr": learning_rate,
                "grad_norm": float(optimizer.grad_norm),  # type: ignore[attr-defined]
                "tokens_per_second": new_tokens / step_seconds,
                "step_ms": 1000 * step_seconds,
                "tokens": tokens,
            }
            check_finite(record)
            if step % eval_interval == 0 or step == last_step:
                record_evaluation(record)
            seconds = session_seconds + time.perf_counter() - session_started
            record["seconds"] = seconds
            append_record(metrics_path, record)
            if tensorboard is not None:
                for name in ("loss", "lr", "grad_norm", "tokens_per_second", "val_loss"):
                    if name in record:
                        tensorboard.add_scalar(name, record[name], step)
            progress.show(record)
            if stop.signal is not None or step % config.checkpoint_interval == 0 or step == last_step:
                path = save()
            if stop.signal is not None:
                console.print(
                    f"stopped after step {step}, saved {path}; go on with: "
                    + resume_command("python -m llama_lora.finetune", arguments)
                )
                return 128 + stop.signal
    finish(config, dtype, device, model, trained, max(peak, peak_memory_bytes(device)), console)
    return 0


def read_rows(config: FinetuneConfig, tokenizer: Any, split: str) -> Rows:
    examples = read_examples(find_split(config.data, split), tokenizer)
    return Rows(examples, config.block_size, packing=config.packing, pad_id=end_of_text(tokenizer))


def training_step(
    backend: Any, model: Any, optimizer: torch.optim.Optimizer, rows: Rows, step: int,
    config: FinetuneConfig, device: torch.device,
) -> tuple[float, int]:  # fmt: skip
    """One optimizer step; (mean loss over all learned targets of its batches, tokens without padding)."""
    model.train()
    first = step * config.accumulation_steps
    batches = [
        rows.training_batch(index, config.batch_size, config.seed, device)
        for index in range(first, first + config.accumulation_steps)
    ]
    valid = sum(batch.valid for batch in batches)
    total = torch.zeros((), device=device)
    for batch in batches:
        loss = backend.loss(model, batch) * (batch.valid / valid)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), sum(batch.tokens for batch in batches)


@torch.no_grad()
def evaluate_rows(
    backend: Backend, model: Any, rows: Rows, batch_size: int, limit: int, device: torch.device
) -> float:
    """Mean loss over the learned targets of up to `limit` rows (0: all), in nats per token."""
    model.eval()
    total, count = 0.0, 0
    for batch in rows.batches(batch_size, device, limit):
        total += backend.loss(model, batch).item() * batch.valid
        count += batch.valid
    return total / count


class Compiled:
    """The losses of a backend through torch.compile."""

    def __init__(self, backend: Backend, model: Any) -> None:
        # Of tensors alone: the counts in a batch would compile it anew every time.
        def loss(ids: Tensor, targets: Tensor, positions: Tensor, document_ids: Tensor) -> Tensor:
            return backend.loss(model, PackedBatch(ids, targets, positions, document_ids, 0, 0))

        self.compiled = torch.compile(loss)

    def loss(self, model: Any, batch: PackedBatch) -> Tensor:
        return self.compiled(batch.ids, batch.targets, batch.positions, batch.document_ids)


def main(arguments: list[str]) -> int:
    return finetune(parse_command_line(arguments), arguments)


if __name__ == "__main__":
    run_program(main)

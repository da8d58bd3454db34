"""Train a GPT: python -m gpt.train --preset demo --kernels optimized --data DIR --out RUN [--resume auto]

RUN/metrics.jsonl gets a line for every step, RUN/summary.json the result, RUN/checkpoints/ the weights.
Ctrl-C (or SIGTERM) finishes the current step, writes a checkpoint and says how to go on.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.numbers import Tape
from gpt import checkpoint
from gpt.cli import StopRequest, UserError, only_writer, run_program, write_atomically
from gpt.config import ModelConfig, TrainConfig, parse_command_line
from gpt.corpus import check_shards, fixed_batches, open_loader, open_tokenizer, text_bytes
from gpt.hardware import (
    device_name,
    gemm_peak_flops,
    peak_memory_bytes,
    pick_device,
    pick_precision,
    set_threads,
    synchronize,
    versions,
)
from gpt.metrics import append_record, check_finite, keep_up_to, open_tensorboard, summarize, summary_is_of
from gpt.model import GPT
from gpt.ops import Ops, load_ops
from tapelm.loader import Batch

# A run that changes one of these is another run; the model's shape and the tokenizer are compared as well.
FIXED_ON_RESUME = ("kernels", "batch_size", "seed")


def train(config: TrainConfig, arguments: list[str] | None = None) -> int:
    """Run the whole training; returns 0 when done and 130 or 143 after a checkpoint forced by a signal.

    Raises UserError for input that cannot be trained on, OSError when the disk is full.
    """
    with only_writer(config.out):
        return _train(config, arguments)


def _train(config: TrainConfig, arguments: list[str] | None) -> int:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    set_threads(config.threads)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    precision = pick_precision(config, device)

    tokenizer = open_tokenizer(config.data / "tokenizer.json")
    loader = open_loader(config.data / "train", config.batch_size, config.block_size, config.seed, device)
    validation = fixed_batches(config, device)
    check_shards(config.data, tokenizer)
    tape = Tape.sha256(config.data)
    steps_per_epoch = max(1, len(loader) // config.accumulation_steps)
    total_steps = config.max_steps or config.epochs * steps_per_epoch

    shape = config.model(tokenizer.vocab_size)
    model, optimizer = model_and_optimizer(config, shape, precision, device)

    checkpoints = config.out / "checkpoints"
    step, tokens, seconds, peak_memory, best_val_loss, digest = 0, 0, 0.0, 0, math.inf, ""
    start = choose_checkpoint(config, checkpoints)
    if start is not None:
        check_same_run(config, shape, precision, start)
        state = checkpoint.restore(start, model, optimizer)
        try:
            loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise UserError(f"cannot resume from {start}: {error}") from error
        step, tokens, seconds = state["step"], state["tokens"], state["seconds"]
        peak_memory = state.get("peak_memory_bytes", 0)
        best_val_loss, digest = state["best_val_loss"] or math.inf, state["batches_sha256"]
        if state["threads"] != torch.get_num_threads():
            console.print(
                f"warning: {torch.get_num_threads()} threads now, {state['threads']} before: "
                "the last bits of the result will differ",
            )
    metrics_path = config.out / "metrics.jsonl"
    keep_up_to(metrics_path, step)

    step_tokens = config.batch_size * config.accumulation_steps * config.block_size
    console.print(
        f"{config.kernels} {precision} on {device_name(device)}: {parameter_count(model):,} parameters, "
        f"steps {step} to {total_steps} of {step_tokens:,} tokens"
        + (f", resumed from {start}" if start else ""),
    )
    last_step = total_steps if config.stop_after is None else min(total_steps, step + config.stop_after)
    tensorboard = open_tensorboard(config.out)
    step_function = torch.compile(model) if config.compile else model
    resumed_at, session_seconds = step, seconds
    peak_before = gemm_peak_flops(device, precision)
    session_started = time.perf_counter()

    def save() -> Path:
        state = {
            "step": step,
            "tokens": tokens,
            "seconds": seconds,
            "peak_memory_bytes": max(peak_memory, peak_memory_bytes(device)),
            "best_val_loss": None if math.isinf(best_val_loss) else best_val_loss,
            "batches_sha256": digest,
            "tape_sha256": tape,
            "loader": loader.state_dict(),
            "generators": checkpoint.generators(),
            "threads": torch.get_num_threads(),
            "precision": precision,
            "config": config.as_json(),
            "versions": versions(),
        }
        tokenizer_file, keep = config.data / "tokenizer.json", config.keep_checkpoints
        return checkpoint.save(checkpoints, model, optimizer, state, tokenizer=tokenizer_file, keep=keep)

    with StopRequest() as stop, progress_bar(console) as progress:
        bar = progress.add_task("", total=total_steps, completed=step, speed=0.0, loss=math.nan)
        model.train()
        while step < last_step:
            synchronize(device)
            step_started = time.perf_counter()
            learning_rate = config.learning_rate_at(step, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss_sum = torch.zeros((), device=device)
            for _ in range(config.accumulation_steps):
                batch = next(loader)  # inputs and targets (B, T) int64
                digest = chain_sha256(digest, batch.inputs)
                with autocast(device, precision):
                    loss = step_function(batch.inputs, batch.targets) / config.accumulation_steps
                loss.backward()
                loss_sum += loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            train_loss = loss_sum.item()
            step_seconds = time.perf_counter() - step_started

            step, tokens = step + 1, tokens + step_tokens
            record = {
                "step": step,
                "loss": train_loss,
                "lr": learning_rate,
                "grad_norm": float(optimizer.grad_norm),  # type: ignore[attr-defined]
                "tokens_per_second": step_tokens / step_seconds,
                "step_ms": 1000 * step_seconds,
                "tokens": tokens,
            }
            if step % config.eval_interval == 0 or step == last_step:
                record["val_loss"] = validation_loss(model, validation, device, precision)
            check_finite(record)
            best_val_loss = min(best_val_loss, record.get("val_loss", math.inf))
            seconds = session_seconds + time.perf_counter() - session_started
            record["seconds"] = seconds
            append_record(metrics_path, record)
            if tensorboard is not None:
                for name in ("loss", "lr", "grad_norm", "tokens_per_second", "val_loss"):
                    if name in record:
                        tensorboard.add_scalar(name, record[name], step)
            progress.update(bar, completed=step, speed=record["tokens_per_second"], loss=train_loss)
            if "val_loss" in record and not console.is_terminal:
                speed = f"{record['tokens_per_second']:,.0f} tokens/s"
                console.print(f"step {step}: loss {train_loss:.4f}, val {record['val_loss']:.4f}, {speed}")

            if stop.signal is not None or step % config.checkpoint_interval == 0 or step == last_step:
                path = save()
            if stop.signal is not None:
                console.print(
                    f"stopped after step {step}, saved {path}; go on with: {resume_command(arguments)}"
                )
                return 128 + stop.signal

    if step == resumed_at and summary_is_of(config.out / "summary.json", step):
        console.print(f"nothing left to do: {start} is already at step {step} of {total_steps}")
        return 0
    summary = {
        **summarize(metrics_path),
        "completed": step >= total_steps,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "peak_memory_bytes": max(peak_memory, peak_memory_bytes(device)),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "parameters": parameter_count(model),
        "gemm_peak_flops": max(peak_before, gemm_peak_flops(device, precision)),  # others may be at work
        "batches_sha256": digest,
        "best_val_loss": best_val_loss,
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": vars(shape),
        "config": config.as_json(),
    }
    val_bits = summary["val_loss"] / math.log(2) * sum(batch.targets.numel() for batch in validation)
    summary["val_bits_per_byte"] = val_bits / text_bytes(tokenizer, validation)
    summary["mfu"] = shape.flops_per_token() * summary["tokens_per_second"] / summary["gemm_peak_flops"]
    write_atomically(config.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    console.print(
        f"step {step}: train loss {summary['train_loss']:.4f}, val loss {summary['val_loss']:.4f} "
        f"({summary['val_bits_per_byte']:.3f} bits per byte), {summary['tokens_per_second']:,.0f} tokens/s",
    )
    return 0


def model_and_optimizer(
    config: TrainConfig, shape: ModelConfig, precision: str, device: torch.device, ops: Ops | None = None,
    **adamw_options: Any,
) -> tuple[GPT, torch.optim.Optimizer]:  # fmt: skip
    """What a run starts from: in bf16, too, its float32 masters are the initial weights, unrounded.

    `ops` takes the place of the table that config.kernels names.
    """
    ops = ops or load_ops(config.kernels)
    model = GPT(shape, ops, activation_checkpointing=config.activation_checkpointing).initialize(config.seed)
    masters = [parameter.detach().clone() for parameter in model.parameters()] if precision == "bf16" else []
    model.to(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    optimizer = ops.adamw(
        model.parameter_groups(config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        max_grad_norm=config.max_grad_norm,
        **adamw_options,
    )
    for parameter, master in zip(model.parameters(), masters, strict=False):
        optimizer.set_master(parameter, master)  # type: ignore[attr-defined]
    return model, optimizer


def choose_checkpoint(config: TrainConfig, checkpoints: Path) -> Path | None:
    """Where --resume says to start from, verified; None for a fresh run, which may not bury an older one."""
    if config.resume == "auto":
        return checkpoint.newest(checkpoints)
    if config.resume != "none":
        path = Path(config.resume)
        checkpoint.verify(path)
        return path
    if any(checkpoints.glob("step-*")):
        raise UserError(
            f"{config.out} already holds a run: continue it with --resume auto or choose another --out"
        )
    return None


def check_same_run(config: TrainConfig, shape: ModelConfig, precision: str, start: Path) -> None:
    """Raise UserError naming the first setting that would make the resumed run another one."""
    state = checkpoint.read_state(start)
    before = state["model"] | {name: state["config"][name] for name in FIXED_ON_RESUME}
    now = vars(shape) | {name: getattr(config, name) for name in FIXED_ON_RESUME}
    before, now = before | {"precision": state["precision"]}, now | {"precision": precision}
    before["tokenizer"] = checkpoint.sha256_of(start / "tokenizer.json")[:12]
    now["tokenizer"] = checkpoint.sha256_of(config.data / "tokenizer.json")[:12]
    before["tape"], now["tape"] = state.get("tape_sha256"), Tape.sha256(config.data)
    for name, value in now.items():
        if before[name] != value:
            raise UserError(
                f"cannot resume from {start}: {name} was {before[name]} and is {value} now; "
                "restore it or start afresh in another --out"
            )


def validation_loss(model: GPT, batches: list[Batch], device: torch.device, precision: str) -> float:
    model.eval()
    with torch.no_grad(), autocast(device, precision):
        losses = [model(batch.inputs, batch.targets).item() for batch in batches]
    model.train()
    return statistics.fmean(losses)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-autocast")


def chain_sha256(previous: str, ids: torch.Tensor) -> str:
    """SHA-256 of the previous digest and these ids (B, T): unlike a running hash it fits a checkpoint."""
    return hashlib.sha256(bytes.fromhex(previous) + ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def parameter_count(model: GPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def resume_command(arguments: list[str] | None) -> str:
    given = list(arguments or [])
    if "--resume" in given:
        position = given.index("--resume")
        del given[position : position + 2]
    return shlex.join(["python", "-m", "gpt.train", *given, "--resume", "auto"])


def main(arguments: list[str]) -> int:
    return train(parse_command_line(arguments), arguments)


if __name__ == "__main__":
    run_program(main)

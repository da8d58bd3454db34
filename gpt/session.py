"""A training between two checkpoints: its model, optimizer and data, a step, a validation, a summary."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data.numbers import Tape
from gpt import checkpoint, parallel
from gpt.cli import UserError, flush
from gpt.config import TrainConfig
from gpt.corpus import (
    check_shards,
    fixed_batches,
    not_out_of_sample,
    open_loader,
    open_tokenizer,
    released,
    text_bytes,
    text_sha256,
)
from gpt.hardware import (
    device_name,
    forget_peak_memory,
    gemm_peak_flops,
    peak_memory_bytes,
    pick_precision,
    set_threads,
    synchronize,
    versions,
)
from gpt.metrics import summarize
from gpt.parallel import Ranks
from gpt.resume import check_unchanged
from gpt.steps import autocast, chain_sha256, model_and_optimizer, norm_of, validation_loss

# A run that changes one of these is another run; the model's shape and the tokenizer are compared as well.
FIXED_ON_RESUME = ("kernels", "batch_size", "accumulation_steps", "seed")
# What may change, but is said.
TOLD_ON_RESUME = (
    "max_steps", "epochs", "learning_rate", "min_learning_rate_ratio", "warmup_steps",
    "weight_decay", "beta1", "beta2", "eps", "max_grad_norm", "activation_checkpointing", "eval_batches",
)  # fmt: skip


def check_block(tape: Path, block_size: int) -> None:
    """Raises UserError for a tape of numbers whose documents are not of this many tokens."""
    block = 2 * Tape.load(tape).context + 2
    if block_size != block:
        raise UserError(
            f"{tape} is a tape in blocks of {block} tokens: pass --block-size {block}, or prepare it "
            f"with --min-block {block_size}"
        )


class Training:
    """Model, optimizer and data of a run, and how far it has come. All ranks call each method."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.device = config, ranks, ranks.device
        set_threads(config.threads)
        torch.manual_seed(config.seed + ranks.rank)  # for dropout; weights have a generator of their own
        self.precision = pick_precision(config, self.device)
        self.tokenizer = open_tokenizer(config.data / "tokenizer.json")
        self.tape = Tape.sha256(config.data)
        if self.tape is not None:
            check_block(config.data, config.block_size)
        self.loader = open_loader(config, ranks)
        self.validation = fixed_batches(config, ranks)
        if ranks.local_rank == 0:
            check_shards(config.data, self.tokenizer)
        self.val_sha256 = checkpoint.sha256_of(config.data / "val" / "manifest.json")[:12]
        self.total_steps = config.max_steps or config.epochs * max(
            1, len(self.loader) // config.accumulation_steps
        )
        self.step_tokens = config.batch_size * config.accumulation_steps * config.block_size * ranks.size

        self.shape = config.model(self.tokenizer.vocab_size)
        several = ranks.size > 1
        self.model, self.optimizer = model_and_optimizer(
            config, self.shape, self.precision, self.device, sharded=several and config.parallel == "fsdp"
        )
        stepped = torch.compile(self.model) if config.compile else self.model
        ddp = several and config.parallel == "ddp"
        self.stepped: Any = parallel.averaging(stepped, self.device) if ddp else stepped  # type: ignore[arg-type]

        self.step, self.tokens, self.seconds, self.peak_memory = 0, 0, 0.0, 0
        span = released(config.data, "train")
        self.trained_until = None if span is None else span[1]
        self.best_val_loss, self.batches_sha256 = math.inf, ""
        if ddp:
            self._settle()
        self.peak_flops = gemm_peak_flops(self.device, self.precision)

    def _settle(self) -> None:
        """After the first backward pass DDP sums gradients in another order. That one comes before any step,
        so that the steps of a resumed run sum as those of an uninterrupted one."""
        shape = (self.config.batch_size, self.config.block_size)
        ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        with autocast(self.device, self.precision):
            loss = self.stepped(ids, ids)
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(self.config.seed + self.ranks.rank)

    def take_weights(self, path: Path, console: Console) -> None:
        """Start from those of another run. Raises UserError when they do not fit."""
        other, found, state = checkpoint.load_model(path, kernels="plain")
        earlier = state.get("trained_until")
        if warning := not_out_of_sample(self.config.data, "val", earlier):
            console.print(warning)
        self.trained_until = max(filter(None, (earlier, self.trained_until)), default=None)
        now = vars(self.shape) | {"tokenizer": checkpoint.sha256_of(self.config.data / "tokenizer.json")[:12]}
        before = vars(other.config) | {"tokenizer": checkpoint.sha256_of(found / "tokenizer.json")[:12]}
        for name in now.keys() - {"dropout"}:
            if before[name] != now[name]:
                raise UserError(
                    f"--initialize-from {path}: its {name} is {before[name]}, that of this run is {now[name]}"
                )
        weights = dict(other.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                weight = parallel.as_cut(weights[name].float(), parameter)
                if self.precision == "bf16":
                    self.optimizer.set_master(parameter, weight)  # type: ignore[attr-defined]
                else:
                    parameter.copy_(weight)

    def __str__(self) -> str:
        processes = "" if self.ranks.size == 1 else f"{self.ranks.size} x {self.config.parallel}, "
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{self.config.kernels} {self.precision} on {processes}{device_name(self.device)}: "
            f"{parameters:,} parameters, steps {self.step} to {self.total_steps} "
            f"of {self.step_tokens:,} tokens"
        )

    def start_clock(self) -> None:
        """From here on time and a GPU's memory count as those of the run."""
        forget_peak_memory(self.device)
        self._before, self._started = self.seconds, time.perf_counter()

    def resume(self, start: Path, console: Console) -> None:
        """Go on from a verified checkpoint. Raises UserError when it is of another run."""
        before, now = checkpoint.read_state(start), self._identity()
        fixed = {name: before["config"][name] for name in FIXED_ON_RESUME}
        known = {"precision": before["precision"], "tape": before.get("tape_sha256")}
        known |= {"tokenizer": checkpoint.sha256_of(start / "tokenizer.json")[:12]}
        known |= {"processes": before.get("processes", 1)}
        known |= {"validation data": before.get("val_sha256", now["validation data"])}
        check_unchanged(before["model"] | fixed | known, now, start)
        state = checkpoint.restore(start, self.model, self.optimizer, self.ranks.rank)
        try:
            self.loader.load_state_dict(state["loader"])
        except ValueError as error:
            raise UserError(f"cannot resume from {start}: {error}") from error
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        if self.step > self.total_steps:
            raise UserError(f"{start} is at step {self.step}, beyond the {self.total_steps} of this run")
        self.peak_memory = state.get("peak_memory_bytes", 0)
        self.trained_until = state.get("trained_until", self.trained_until)
        self.best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
        self.batches_sha256 = state["batches_sha256"]
        for name in TOLD_ON_RESUME:
            then, now = state["config"].get(name), getattr(self.config, name)
            if then != now:
                console.print(f"note: {name} was {then} and is {now} from here on")
        if state["threads"] != torch.get_num_threads():
            console.print(
                f"warning: {torch.get_num_threads()} threads now, {state['threads']} before: "
                "the last bits of the result will differ",
            )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint has to agree with to be one of this run."""
        fixed = {name: getattr(self.config, name) for name in FIXED_ON_RESUME}
        return {
            **vars(self.shape),
            **fixed,
            "precision": self.precision,
            "tokenizer": checkpoint.sha256_of(self.config.data / "tokenizer.json")[:12],
            "tape": self.tape,
            "processes": self.ranks.size,
            "validation data": self.val_sha256,
        }

    def take_step(self) -> dict[str, Any]:
        """One optimizer step; what metrics.jsonl says of it."""
        config = self.config
        synchronize(self.device)
        started = time.perf_counter()
        learning_rate = config.learning_rate_at(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = torch.zeros((), device=self.device)
        for left in reversed(range(config.accumulation_steps)):
            batch = next(self.loader)  # inputs and targets (B, T) int64
            self.batches_sha256 = chain_sha256(self.batches_sha256, batch.inputs)
            with parallel.keeping_gradients(self.stepped) if left else contextlib.nullcontext():
                with autocast(self.device, self.precision):
                    loss = self.stepped(batch.inputs, batch.targets) / config.accumulation_steps
                loss.backward()
            loss_sum += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.ranks.mean(loss_sum.item())
        seconds = time.perf_counter() - started
        self.step, self.tokens = self.step + 1, self.tokens + self.step_tokens
        return {
            "step": self.step,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": norm_of(self.optimizer),
            "tokens_per_second": self.step_tokens / seconds,
            "step_ms": 1000 * seconds,
            "tokens": self.tokens,
        }

    def validate(self) -> float:
        return validation_loss(self.model, self.validation, self.ranks, self.precision)

    def count(self, record: dict[str, Any]) -> float:
        """Note the validation loss of a record, if it has one; the seconds of the whole run so far."""
        self.best_val_loss = min(self.best_val_loss, record.get("val_loss", math.inf))
        self.seconds = self._before + time.perf_counter() - self._started
        return self.seconds

    def save(self) -> Path | None:
        """The checkpoint of this step, on rank 0, which writes it."""
        tensors = checkpoint.tensors_of(self.model, self.optimizer, keep=self.ranks.leads)
        generators = self.ranks.gather(checkpoint.generators(self.device))
        peak_memory = self._peak_memory()
        if not self.ranks.leads:
            return None
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory,
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "batches_sha256": self.batches_sha256,
            "tape_sha256": self.tape,
            "trained_until": self.trained_until,
            "val_sha256": self.val_sha256,
            "loader": self.loader.state_dict(),
            "generators": generators,
            "processes": self.ranks.size,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "model": vars(self.shape),
            "config": self.config.as_json(),
            "versions": versions(),
        }
        flush(self.config.out / "metrics.jsonl")  # which a checkpoint must not be ahead of
        root, tokenizer = self.config.out / "checkpoints", self.config.data / "tokenizer.json"
        return checkpoint.save(root, tensors, state, tokenizer=tokenizer, keep=self.config.keep_checkpoints)

    def _peak_memory(self) -> int:
        """Of the rank that has needed most."""
        return int(self.ranks.largest(max(self.peak_memory, peak_memory_bytes(self.device))))

    def summary(self) -> dict[str, Any]:
        """What summary.json says; from metrics.jsonl, which rank 0 has written."""
        peak_memory = self._peak_memory()
        # Measured again, as others may have been at work the first time.
        peak_flops = max(self.peak_flops, gemm_peak_flops(self.device, self.precision)) * self.ranks.size
        if not self.ranks.leads:
            return {}
        summary = {
            **summarize(self.config.out / "metrics.jsonl", self.step),
            "completed": self.step >= self.total_steps,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "peak_memory_bytes": peak_memory,
            "model_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "gemm_peak_flops": peak_flops,
            "batches_sha256": self.batches_sha256,
            "best_val_loss": self.best_val_loss,
            "device": device_name(self.device),
            "processes": self.ranks.size,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "model": vars(self.shape),
            "config": self.config.as_json(),
        }
        summary["text_sha256"] = text_sha256(self.config.data, "val")
        summary["val_tokens"] = sum(batch.targets.numel() for batch in self.validation)
        val_bits = summary["val_loss"] / math.log(2) * summary["val_tokens"]
        summary["val_bits_per_byte"] = val_bits / text_bytes(self.tokenizer, self.validation)
        summary["mfu"] = self.shape.flops_per_token() * summary["tokens_per_second"] / peak_flops
        return summary

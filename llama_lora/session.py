"""A fine-tuning between two checkpoints: its model, optimizer and rows, a step, an evaluation."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gpt import checkpoint
from gpt.cli import flush
from gpt.hardware import (
    forget_peak_memory,
    peak_memory_bytes,
    pick_device,
    set_threads,
    synchronize,
    versions,
)
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import Backend, get_backend, open_tokenizer
from llama_lora.config import FinetuneConfig
from llama_lora.dataset import end_of_text, find_split, read_examples
from llama_lora.packing import PackedBatch, Rows
from llama_lora.results import check_same_run, inputs, pick_dtype
from llama_lora.trained import Trained
from llama_lora.verify import verify


class Finetuning:
    """A model with its adapters, its optimizer and its rows, and how far the run has come."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        set_threads(config.threads)
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.precision, self.device)
        self.backend: Backend = get_backend(config.backend)
        self.recipe = Recipe(config.method, config.rank, config.alpha, config.target_modules)
        self.model: Any = self.backend.load(config.model, self.recipe, self.dtype, self.device)
        self.tokenizer = open_tokenizer(config.model)
        self.train, self.validation = (read_rows(config, self.tokenizer, split) for split in ("train", "val"))
        files.reset(self.backend.adapters(self.model), config.seed)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer: Any = self.backend.optimizer(self.model, config)
        self.inputs = inputs(config)
        self.trained = Trained(self.model)
        self.stepped: Any = Compiled(self.backend, self.model) if config.compile else self.backend

        rows_per_step = config.batch_size * config.accumulation_steps
        steps_per_epoch = max(1, -(-len(self.train) // rows_per_step))
        self.total_steps = config.max_steps or config.epochs * steps_per_epoch
        self.eval_interval = config.eval_interval or steps_per_epoch
        self.step, self.tokens, self.seconds, self._peak = 0, 0, 0.0, 0
        self.best_val_loss, self.waited = math.inf, 0  # evaluations since the best one

    def __str__(self) -> str:
        config = self.config
        return (
            f"{config.backend} {config.method} {str(self.dtype).removeprefix('torch.')}: "
            f"{sum(p.numel() for _, p in self.trained.named_parameters()):,} parameters train, steps "
            f"{self.step} to {self.total_steps} of {config.batch_size * config.accumulation_steps} rows of "
            f"{config.block_size}, {self.train.tokens:,} tokens ({self.train.fill:.1%} of the rows)"
        )

    def resume(self, start: Path) -> None:
        """Go on from a verified checkpoint. Raises UserError when it is of another run."""
        check_same_run(self.config, self.dtype, start, self.inputs)
        state = checkpoint.restore(start, self.trained, self.optimizer)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self._peak, self.waited = state["peak_memory_bytes"], state["waited"]
        self.best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]

    def verify(self, console: Console) -> None:
        """Check the model, which stays as it is. Raises UserError naming what is wrong with it."""
        if not self.config.verify:
            console.print("WARNING: --no-verify: packing, gradients and the adapter file are NOT checked")
            return
        report = verify(self.backend, self.model, self.recipe, self.config.model, self.device)
        console.print(
            f"verified: leak {report.leak:.1e}, packed logits within {report.packed_error:.1e}, "
            f"least cosine of a gradient {report.cosine:.5f} ({report.worst or 'no adapters'})"
        )

    def start_clock(self) -> None:
        """From here on time and a GPU's memory count as those of the run."""
        forget_peak_memory(self.device)
        self._before, self._started = self.seconds, time.perf_counter()

    def take_step(self) -> dict[str, Any]:
        """One optimizer step; what metrics.jsonl says of it."""
        config = self.config
        synchronize(self.device)
        started = time.perf_counter()
        learning_rate = config.learning_rate_at(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        first = self.step * config.accumulation_steps
        batches = [
            self.train.training_batch(index, config.batch_size, config.seed, self.device)
            for index in range(first, first + config.accumulation_steps)
        ]
        valid = sum(batch.valid for batch in batches)
        total = torch.zeros((), device=self.device)  # the mean over all learned targets of the batches
        for batch in batches:
            loss = self.stepped.loss(self.model, batch) * (batch.valid / valid)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, tokens = total.item(), sum(batch.tokens for batch in batches)  # without padding
        seconds = time.perf_counter() - started
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        return {
            "step": self.step,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": float(self.optimizer.grad_norm),
            "tokens_per_second": tokens / seconds,
            "step_ms": 1000 * seconds,
            "tokens": self.tokens,
        }

    def evaluate(self) -> float:
        """The validation loss, in nats per token; the adapter is published when it is the best so far."""
        config = self.config
        loss = evaluate_rows(
            self.backend, self.model, self.validation, config.batch_size, config.eval_rows, self.device
        )
        self.waited = 0 if loss < self.best_val_loss else self.waited + 1
        if loss < self.best_val_loss and self.step > 0:
            self.trained.publish(config, self.backend, self.recipe, self.tokenizer)
        self.best_val_loss = min(self.best_val_loss, loss)
        return loss

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or evaluations have not improved for as many as patience allows."""
        return self.step >= self.total_steps or 0 < self.config.patience <= self.waited

    def count_seconds(self) -> float:
        """The seconds of the whole run so far."""
        self.seconds = self._before + time.perf_counter() - self._started
        return self.seconds

    @property
    def peak_memory(self) -> int:
        return max(self._peak, peak_memory_bytes(self.device))

    def save(self) -> Path:
        """The checkpoint of this step."""
        config = self.config
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "best_val_loss": None if math.isinf(self.best_val_loss) else self.best_val_loss,
            "waited": self.waited,
            "precision": str(self.dtype),
            "threads": torch.get_num_threads(),
            "generators": checkpoint.generators(self.device),
            "config": config.as_json(),
            "inputs": self.inputs,
            "versions": versions(),
            "model": vars(self.trained.config),
        }
        flush(config.out / "metrics.jsonl")  # which a checkpoint must not be ahead of
        tensors = checkpoint.tensors_of(self.trained, self.optimizer)
        root, tokenizer = config.out / "checkpoints", config.model / "tokenizer.json"
        return checkpoint.save(root, tensors, state, tokenizer=tokenizer, keep=config.keep_checkpoints)


def read_rows(config: FinetuneConfig, tokenizer: Any, split: str) -> Rows:
    examples = read_examples(find_split(config.data, split), tokenizer)
    return Rows(examples, config.block_size, packing=config.packing, pad_id=end_of_text(tokenizer))


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

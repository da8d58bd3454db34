"""What a fine-tuning run can be told: one flat dataclass and its command line."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from gpt.cli import UserError, parse_options

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama block, in the order in which a block calls them."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tunes a Llama model with LoRA, QLoRA or all weights, after checking packing and gradients.

    Ctrl-C finishes a step and writes a checkpoint; the same command with --resume auto goes on.
    """

    model: Path
    """A Hugging Face directory of a Llama model, such as `python -m llama_lora.fetch` writes."""
    data: Path
    """A directory with train.jsonl and val.jsonl, or documents/ with them as `python -m data.prepare` writes.
    A line holds text, or a dialogue: messages, prompt + completion, or instruction (+ input) + output."""
    out: Path
    """Run directory: adapter/, metrics.jsonl, summary.json, loss.png and checkpoints/ go here."""
    method: Literal["lora", "qlora", "full"] = "qlora"
    """qlora: the base in NF4 with double quantization; lora: the base as it is; full: all weights train."""
    backend: Literal["tapelm", "hf", "unsloth"] = "tapelm"
    """tapelm: transformers with our kernels; hf: peft and bitsandbytes; unsloth: needs the package."""

    rank: int = 16
    """Rows of A and columns of B of each adapter."""
    alpha: float = 16.0
    """The low-rank product is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Projections that get an adapter."""
    block_size: int = 512
    """Tokens in a row of a batch; longer documents are cut into pieces, and nothing is left out."""
    packing: bool = True
    """Fill rows with several documents, which do not see each other; without it a row holds one."""
    batch_size: int = 4
    """Rows in one forward pass."""
    accumulation_steps: int = 1
    """Forward passes in one optimizer step."""
    epochs: int = 1
    """Passes over the training rows, where max_steps is not given."""
    max_steps: int | None = None
    """Optimizer steps of the whole schedule; None means `epochs` passes."""
    stop_after: int | None = None
    """End this session after so many steps with a checkpoint; the schedule still spans max_steps."""
    learning_rate: float = 2e-4
    """The highest, after the warmup."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """From learning_rate down to 0 after the warmup."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises to learning_rate."""
    weight_decay: float = 0.0
    """AdamW's; applied to all that trains."""
    max_grad_norm: float = 1.0
    """Gradients of a larger L2 norm over all that trains are scaled down to it."""
    optimizer_bits: Literal[8, 32] = 8
    """Bits of each AdamW moment with the tapelm backend; PyTorch's AdamW of the others has 32."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it."""
    gradient_checkpointing: bool = False
    """Compute the inside of each block again in the backward pass instead of keeping it."""
    compile: bool = False
    """Run the model through torch.compile."""

    eval_interval: int = 0
    """Steps between evaluations; 0 evaluates once an epoch. The base model is evaluated at step 0."""
    eval_rows: int = 64
    """Rows of the validation split to evaluate, the same ones every time; 0 takes all."""
    patience: int = 0
    """Stop when so many evaluations in a row brought no better loss; 0 never does."""
    checkpoint_interval: int = 50
    """Steps between checkpoints: a run that is killed loses no more than these."""
    keep_checkpoints: int = 2
    """The newest so many stay."""
    resume: str = "none"
    """none starts afresh, auto goes on from the newest valid checkpoint; or the directory of one or a run."""
    verify: bool = True
    """Check packing, gradients and the adapter file before training; --no-verify trains unchecked."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 takes PyTorch's default."""
    seed: int = 1234
    """Of the adapters and the order of rows."""

    def __post_init__(self) -> None:
        positive = ("rank", "block_size", "batch_size", "accumulation_steps", "epochs")
        for name in (*positive, "checkpoint_interval", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_interval", "eval_rows", "patience", "warmup_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("max_steps", "stop_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay must not be negative, got {self.weight_decay}")
        unknown = sorted(set(self.target_modules) - set(PROJECTIONS))
        if unknown or not self.target_modules:
            raise UserError(f"target_modules: {unknown or 'none'}; choose from {', '.join(PROJECTIONS)}")

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the zero-based `step`: linear warmup, then the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = 1.0 - min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 - math.cos(math.pi * left))
        return self.learning_rate * left

    def as_json(self) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}


def parse_command_line(arguments: list[str]) -> FinetuneConfig:
    return parse_options(FinetuneConfig, arguments, prog="python -m llama_lora.finetune")

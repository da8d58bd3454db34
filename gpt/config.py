"""What a training run can be told: one flat dataclass, five presets, and a command line over both."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any, Literal

import tyro

from gpt.cli import UserError, parse_options


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT. Two runs with equal ModelConfig and seed start from the same weights."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")

    def flops_per_token(self) -> float:
        """Training flops of one token (forward + backward, 3x forward) with full blocks.

        Matrix products only, two flops per multiply-add; attention counts the causal half it has to compute.
        """
        matmul_parameters = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        attention = 6 * self.n_layer * self.block_size * self.n_embd
        return 6.0 * matmul_parameters + attention


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Trains a GPT on a directory of data.prepare, from a preset of which any option changes a value.

    Ctrl-C finishes a step and writes a checkpoint; the same command with --resume auto goes on. The learning
    rate rises over warmup_steps and falls along half a cosine. Options are shown with the preset's values:
    --preset seed --help. A step has batch_size x accumulation_steps x block_size tokens of each process.
    """

    data: Path
    """Data directory written by `python -m data.prepare`."""
    out: Path
    """Run directory: metrics.jsonl, summary.json and checkpoints/ go here."""
    preset: str = "demo"
    """Starting values, see above. Every other option overrides one of them."""
    kernels: Literal["plain", "optimized"] = "optimized"
    """plain calls PyTorch only; optimized calls the tapelm ops. Nothing else changes."""
    resume: str = "none"
    """none starts afresh, auto goes on from the newest valid checkpoint; or the directory of one or a run."""
    initialize_from: Path | None = None
    """Start from the weights of this run or checkpoint, of the same shape and tokenizer, instead of random
    ones: to go on with new text, which data.prepare --tokenizer encodes alike."""

    n_layer: int = 4
    """Blocks of attention and MLP."""
    n_head: int = 4
    """Attention heads; n_embd must be a multiple."""
    n_embd: int = 256
    """Width of the model."""
    block_size: int = 128
    """Tokens in one training window, and the longest context."""
    vocab_size: int = 0
    """Rows of the embedding and the head; 0 takes the tokenizer's size."""
    dropout: float = 0.0
    """Probability; of attention weights, of what every branch adds, and of embeddings."""

    batch_size: int = 16
    """Windows in one forward pass."""
    accumulation_steps: int = 1
    """Forward passes in one optimizer step."""
    max_steps: int | None = None
    """Optimizer steps of the whole schedule; None means `epochs` passes over the training tokens."""
    epochs: int = 1
    """Passes over the training tokens, where max_steps is not given."""
    stop_after: int | None = None
    """End this session after so many steps with a checkpoint; the schedule still spans max_steps."""
    learning_rate: float = 1e-3
    """The highest, after the warmup."""
    min_learning_rate_ratio: float = 0.1
    """The cosine ends at this fraction of learning_rate."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises to learning_rate."""
    weight_decay: float = 0.1
    """Applied to matrices only, never to biases and norms."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to the root in AdamW's denominator."""
    max_grad_norm: float = 1.0
    """Gradients of a larger L2 norm over all parameters are scaled down to it."""

    precision: Literal["auto", "fp32", "bf16-autocast", "bf16"] = "auto"
    """bf16 keeps bf16 weights with the optimizer's fp32 master. auto: fp32 for plain; for optimized bf16
    where the hardware has it, else fp32."""
    activation_checkpointing: bool = False
    """Compute a block's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Run the model through torch.compile."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes (torchrun): ddp has the whole model in each, fsdp (FSDP2) cuts parameters,
    gradients and optimizer states among them. batch_size and accumulation_steps are each process's."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads, pinned for the whole run; 0 takes PyTorch's default. Bits depend on this number."""
    seed: int = 1234
    """Of the weights, the order of batches and dropout."""

    eval_interval: int = 50
    """Steps between validation losses."""
    eval_batches: int = 8
    """Validation batches of each process, the same ones every time."""
    checkpoint_interval: int = 100
    """Steps between checkpoints: a run that is killed loses no more than these."""
    keep_checkpoints: int = 2
    """The newest so many stay."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset {self.preset!r}; choose one of: {', '.join(PRESETS)}")
        at_least_one = ("batch_size", "accumulation_steps", "epochs", "eval_interval", "eval_batches")
        for name in (*at_least_one, "checkpoint_interval", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "stop_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        # Comparisons written so that NaN fails them.
        for name in ("learning_rate", "max_grad_norm", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "weight_decay",
            "warmup_steps",
            "min_learning_rate_ratio",
            "threads",
            "vocab_size",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.kernels == "plain" and self.precision == "bf16":
            raise UserError(
                "--precision bf16 needs the fp32 master weights of tapelm.AdamW: "
                "use --kernels optimized, or --precision bf16-autocast with plain"
            )

    def model(self, tokenizer_size: int) -> ModelConfig:
        """The model's shape on data whose tokenizer has `tokenizer_size` ids."""
        if self.vocab_size and self.vocab_size < tokenizer_size:
            raise UserError(
                f"vocab_size {self.vocab_size} is smaller than the tokenizer's {tokenizer_size}: "
                "raise --vocab-size or prepare the data with a smaller vocabulary"
            )
        return ModelConfig(
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            block_size=self.block_size,
            vocab_size=self.vocab_size or tokenizer_size,
            dropout=self.dropout,
        )

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the zero-based `step`: linear warmup, then half a cosine down to the floor."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        floor = self.min_learning_rate_ratio
        return self.learning_rate * (floor + (1.0 - floor) * cosine)

    def as_json(self) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}


# Each preset lists only what differs from the defaults above.
PRESETS: dict[str, dict[str, Any]] = {
    # A few minutes for each table of ops on two CPU cores.
    "demo": {"max_steps": 120},
    # The model and schedule of the original course project.
    "seed": {
        "n_layer": 6,
        "n_head": 8,
        "n_embd": 512,
        "block_size": 256,
        "vocab_size": 10_000,
        "dropout": 0.1,
        "learning_rate": 3e-4,
        "epochs": 10,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "beta2": 0.999,
        "eval_interval": 250,
        "eval_batches": 32,
        "checkpoint_interval": 100,
    },
    # An hour on two CPU cores with bf16: many small steps, which at this size learn more than few large ones.
    "finance": {
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 256,
        "block_size": 256,
        "batch_size": 8,
        "max_steps": 24_000,
        "learning_rate": 2e-3,
        "min_learning_rate_ratio": 0.05,
        "warmup_steps": 200,
        "eval_interval": 1000,
        "eval_batches": 64,
        "checkpoint_interval": 1000,
    },
    # The tape of numbers (data.prepare --view numbers), a few minutes.
    "tape": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 256,
        "dropout": 0.1,
        "learning_rate": 1.5e-3,
        "min_learning_rate_ratio": 0.05,
        "max_steps": 800,
        "warmup_steps": 50,
        "eval_interval": 100,
    },
    # GPT-2 small; 50,257 ids padded to a multiple of 64 for the matrix units.
    "gpt2": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "block_size": 1024,
        "vocab_size": 50_304,
        "batch_size": 8,
        "accumulation_steps": 8,
        "learning_rate": 6e-4,
        "warmup_steps": 700,
        "eval_interval": 250,
        "eval_batches": 32,
        "checkpoint_interval": 1000,
    },
}


def preset(name: str, *, data: Path, out: Path, **overrides: Any) -> TrainConfig:
    """The TrainConfig of a preset. Raises UserError with the list when there is none of that name."""
    return TrainConfig(data=data, out=out, preset=name, **(PRESETS.get(name, {}) | overrides))


def parse_command_line(arguments: list[str]) -> TrainConfig:
    """Two passes: find --preset, then let tyro override its values option by option."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # Without a value, which tyro then complains about, any preset will do.
    finder.add_argument("--preset", nargs="?", default="demo", const="demo")
    name = finder.parse_known_args(arguments)[0].preset
    defaults = preset(name, data=tyro.MISSING, out=tyro.MISSING)
    described = f"{inspect.getdoc(TrainConfig)}\n\n{describe_presets()}"
    return parse_options(
        TrainConfig, arguments, prog="python -m gpt.train", default=defaults, description=described
    )


def describe_presets() -> str:
    """A line for each preset."""
    lines = []
    for name in PRESETS:
        config = preset(name, data=Path(), out=Path())
        steps = f"{config.max_steps:,} steps" if config.max_steps else f"epochs: {config.epochs}"
        vocabulary = f", vocabulary {config.vocab_size:,}" if config.vocab_size else ""
        lines.append(
            f"{name}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
            f"{config.block_size} tokens of context{vocabulary}, "
            f"{config.batch_size * config.accumulation_steps} windows a step, {steps}, "
            f"learning rate {config.learning_rate:g}, dropout {config.dropout:g}"
        )
    return "Presets:\n\n" + "\n\n".join(lines)

"""A training step of a model of transformers: stock, with `tapelm.hf.optimize`, and on GPUs with Liger.

It is a Llama, or has the sizes of a model that is given; weights are random and dropout is off, so that
losses can be compared. All weights train, in bf16 where the hardware multiplies it. A step is forward,
backward and the same fused AdamW of PyTorch for all, so that what differs is the model alone; one more row
has `tapelm.AdamW`. All start from the same weights and see the same batches; before anything is timed their
losses are compared, and the norms of their gradients. Where this process keeps its memory (see kept_memory),
the stock model runs in one that does not, as most people run it, and in one that does. Liger has a process
of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tapelm
from benchmarks.elsewhere import Elsewhere
from benchmarks.harness import Row
from benchmarks.kept_memory import is_kept
from benchmarks.llama import interleaved
from gpt.cli import UserError
from gpt.extras import transformers
from llama_lora.results import pick_dtype

SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
    "vocab_size": 49_152, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
"""Of SmolLM2-135M, but for its 30 layers."""
LAYERS = 6
STOCK, OURS, LIGER = "transformers", "tapelm.hf", "liger"


def config_of(model: Path | None, layers: int | None) -> Any:
    """transformers' configuration of the model in a directory, or of our Llama; with other `layers` if given.

    Raises UserError for a directory without one that transformers can read.
    """
    library = transformers()
    if layers is not None and layers < 1:
        raise UserError(f"--layers {layers}: a model has at least one")
    if model is None:
        return library.LlamaConfig(num_hidden_layers=layers or LAYERS, use_cache=False, **SIZES)
    if not (model / "config.json").is_file():
        raise UserError(f"--model {model}: there is no config.json in it")
    try:
        config = library.AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: {error}") from error
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
    config.use_cache = False
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


class Step:
    """A model with its optimizer; calling it takes one step on the next of a few fixed batches.

    kind: STOCK, OURS or LIGER; `ours_adamw` for tapelm.AdamW in place of PyTorch's.
    """

    def __init__(
        self, kind: str, config: Any, batch_size: int, length: int, device: torch.device,
        *, ours_adamw: bool = False,
    ) -> None:  # fmt: skip
        library, self.device, self.dtype = transformers(), device, pick_dtype("auto", device)
        torch.manual_seed(0)
        most = getattr(config, "max_position_embeddings", length)
        if length > most:
            raise UserError(f"--length {length}: the model has positions for {most} tokens")
        try:
            self.model = library.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=self.dtype
            ).to(device)
            if kind == OURS:
                tapelm.hf.optimize(self.model)
        except ValueError as error:  # of a model that has no loss of the next token, or that is not ours
            raise UserError(str(error)) from error
        if kind == LIGER:
            liger = importlib.import_module("liger_kernel.transformers")  # of the extra peers
            liger.apply_liger_kernel_to_llama(model=self.model)
        parameters = list(self.model.parameters())
        self.optimizer: torch.optim.Optimizer = (
            tapelm.AdamW(parameters, lr=1e-4)
            if ours_adamw
            else torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        )
        generator = torch.Generator().manual_seed(0)
        size = (batch_size, length)
        ids = [torch.randint(config.vocab_size, size, generator=generator).to(device) for _ in range(3)]
        self.first, self.batches = ids[0], itertools.cycle(ids)
        layers = config.num_hidden_layers
        self.label, self.shape = kind, f"{layers} layers, {batch_size} x {length}"
        self.tokens = float(batch_size * length)
        multiplied = {
            p
            for m in self.model.modules()
            if not isinstance(m, torch.nn.Embedding)
            for p in m.parameters(False)
        }
        matrices = sum(p.numel() for p in multiplied if p.ndim == 2)  # a tied embedding is the head as well
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        keys = layers * length / 2 * width * config.num_attention_heads
        self.flops = 6.0 * self.tokens * (matrices + 2 * keys)
        self.losses: list[torch.Tensor] = []
        self.norm = 0.0

    def __call__(self) -> None:
        ids = next(self.batches)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())

    def evaluate(self) -> float:
        """The loss in training mode of the first batch; keeps the norm of its gradients."""
        self.model.train()
        loss = self.model(input_ids=self.first, labels=self.first).loss
        loss.backward()
        self.norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def gradient_norm(self) -> float:
        return self.norm


def agree(steps: Mapping[str, Any]) -> None:
    """Raises UserError where the loss before the first step, or its gradients' norm, is not transformers'."""
    losses = {name: step.evaluate() for name, step in steps.items()}
    norms = {name: step.gradient_norm() for name, step in steps.items()}
    for what, found, tolerance in (("losses", losses, 2e-3), ("norms of gradients", norms, 1e-2)):
        expected = next(iter(found.values()))
        if not all(abs(value - expected) <= tolerance * expected for value in found.values()):
            raise UserError(f"the models disagree, nothing was timed: {what} {found}")


def measure(
    config: Any, batch_size: int, length: int, device: torch.device, rounds: int
) -> tuple[list[Row], list[str]]:
    """Rows of all variants, ratios to the stock model; a line with the reason for each that cannot run."""
    build: Callable[..., Any] = partial(
        Step, config=config, batch_size=batch_size, length=length, device=device
    )
    kind = config.model_type
    skipped = []
    kept = device.type == "cpu" and is_kept()
    steps: dict[str, Any] = {STOCK: Elsewhere(partial(build, STOCK)) if kept else build(STOCK)}
    if kept:
        steps[f"{STOCK}, memory kept"] = build(STOCK)
    steps[OURS] = build(OURS)
    steps[f"{OURS}, tapelm.AdamW"] = build(OURS, ours_adamw=True)
    if device.type != "cuda":
        skipped.append("Liger: its kernels run on GPUs alone")
    elif kind != "llama":
        skipped.append("Liger: compared on Llamas alone")
    elif importlib.util.find_spec("liger_kernel") is None:
        skipped.append("Liger: not installed (pip install -e .[peers])")
    else:
        # It exchanges functions of transformers' own modules, which the stock model would run with as well.
        steps[LIGER] = Elsewhere(partial(build, LIGER))
    agree(steps)
    print(f"{rounds} rounds of {len(steps)} steps", file=sys.stderr)
    step = steps[OURS]
    rows = interleaved(f"hf {kind}", step.shape, step.dtype, steps, "gemm", step.flops, device, rounds)
    for row in rows:
        row.extra["tokens_per_second"] = 1e3 * step.tokens / row.median_ms
    for each in steps.values():
        if isinstance(each, Elsewhere):
            each.close()
    return rows, skipped

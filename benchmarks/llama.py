"""LoRA and QLoRA on a Llama model, ours against peft and bitsandbytes, and decoding against transformers.

A step is forward, backward, clip and update on rows packed with documents of different lengths; tokens per
second count no padding. All variants start from the same adapters and see the same batches; before anything
is timed their losses are compared, and the norms of their first gradients. Peak memory is that of a process
of its own that takes two steps. The fraction of the ceiling counts products with the frozen weights and
attention, not those of the adapters. Unsloth, whose libraries are older than ours, computes in an environment
of its own; there are no kernels of its own on a CPU, where it runs what peft and transformers do.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import Ceilings
from benchmarks.elsewhere import Elsewhere
from benchmarks.harness import Row, interleave, make_row
from gpt.cli import UserError
from llama_lora import adapters as files
from llama_lora.adapters import Recipe
from llama_lora.backends import TapelmBackend, get_backend, open_base
from llama_lora.config import FinetuneConfig
from llama_lora.dataset import IGNORED, Example
from llama_lora.decoder import Decoder
from llama_lora.generate import generate
from llama_lora.packing import Rows
from llama_lora.results import flops_per_token, model_bytes, pick_dtype
from tapelm.testing import TOLERANCES

BACKENDS = ("hf", "tapelm")
METHODS = ("qlora", "lora")
BLOCK_SIZE = 512
PROMPT_TOKENS, NEW_TOKENS = 32, 256


@dataclass
class Step:
    """A model with its optimizer; calling it takes one step on the next of a few fixed batches."""

    backend_name: str
    method: str
    path: Path
    batch_size: int
    device: torch.device
    precision: str = "auto"
    optimizer_bits: int = 8

    def __post_init__(self) -> None:
        self.backend, self.dtype = get_backend(self.backend_name), pick_dtype(self.precision, self.device)
        self.config = FinetuneConfig(
            self.path, Path(), Path(), method=self.method, backend=self.backend_name,  # type: ignore[arg-type]
            batch_size=self.batch_size, block_size=BLOCK_SIZE, optimizer_bits=self.optimizer_bits,  # type: ignore[arg-type]
        )  # fmt: skip
        self.model: Any = self.backend.load(self.path, Recipe(self.method), self.dtype, self.device)
        files.reset(self.backend.adapters(self.model), 0)
        self.optimizer = self.backend.optimizer(self.model, self.config)
        rows = Rows(
            documents(self.model.config.vocab_size, 4 * self.batch_size * BLOCK_SIZE), BLOCK_SIZE,
            packing=True, pad_id=0,
        )  # fmt: skip
        self.batches = [rows.training_batch(i, self.batch_size, 0, self.device) for i in range(3)]
        self.tokens = statistics.fmean(batch.tokens for batch in self.batches)
        self.flops = flops_per_token(self.model.config, self.config) * self.tokens
        self.label = f"{self.backend_name} {self.method}"
        self.shape = f"{self.batch_size} x {BLOCK_SIZE}"
        self.losses: list[torch.Tensor] = []

    def loss(self) -> torch.Tensor:
        return self.backend.loss(self.model, self.batches[len(self.losses) % len(self.batches)])

    def evaluate(self) -> float:
        """The loss of the batch that is next."""
        with torch.no_grad():
            return self.loss().item()

    def gradient_norm(self) -> float:
        """Of all adapters in the last step, before clipping."""
        return float(self.optimizer.grad_norm)  # type: ignore[attr-defined]

    def __call__(self) -> None:
        self.model.train()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


def documents(vocab_size: int, tokens: int) -> list[Example]:
    """Random ids in documents of 50 to 700 tokens, the same ones every time."""
    generator, examples = np.random.default_rng(0), []
    while tokens > 0:
        ids = generator.integers(0, vocab_size, int(generator.integers(50, 700)))
        examples.append(Example(ids, np.append(ids[1:], IGNORED)))
        tokens -= len(ids)
    return examples


def measure(
    path: Path, batch_size: int, device: torch.device, rounds: int, unsloth: Path | None = None,
    *, save: Callable[[list[Row]], None] | None = None,
) -> list[Row]:  # fmt: skip
    """Rows of the training steps, both methods, and of decoding.

    unsloth: the Python of its environment.
    save: called after each of these parts with all rows so far.
    """
    if unsloth is not None:
        check_environment(unsloth)
    rows: list[Row] = []
    pythons = dict.fromkeys(BACKENDS, Path(sys.executable)) | (
        {} if unsloth is None else {"unsloth": unsloth}
    )
    for method in METHODS:
        print(f"{method}: peak memory, then {rounds} rounds of steps", file=sys.stderr)
        builds = {name: partial(Step, name, method, path, batch_size, device) for name in pythons}
        memory = {name: peak_memory(builds[name], python) for name, python in pythons.items()}
        steps = {name: builds[name]() for name in BACKENDS}
        functions: dict[str, Any] = dict(steps)
        if unsloth is not None:
            functions["unsloth"] = Elsewhere(builds["unsloth"], python=unsloth)
        agree(functions)
        step = steps["hf"]
        made = interleaved(
            f"llama {method}", step.shape, step.dtype, functions, "gemm", step.flops, device, rounds
        )
        for row in made:
            row.extra["tokens_per_second"] = 1e3 * step.tokens / row.median_ms
            row.extra["peak_memory_bytes"] = memory[row.variant]
        rows += made
        for function in functions.values():
            if isinstance(function, Elsewhere):
                function.close()
        del step, steps, functions, function
        if save is not None:
            save(rows)
    for method in METHODS:
        print(f"{method}: decoding", file=sys.stderr)
        rows += decoding(path, method, device, max(1, rounds // 3))
        if save is not None:
            save(rows)
    return rows


def check_environment(python: Path) -> None:
    """Raise UserError unless `python` can take Unsloth's steps."""
    command = [str(python), "-c", "import unsloth, tapelm, matplotlib, tyro"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1] if done.returncode else ""
    except OSError as error:
        said = str(error)
    if said:
        raise UserError(
            f"--unsloth: {python} is no Python with Unsloth and tapelm ({said}); make one: python3 -m venv "
            "runs/unsloth && runs/unsloth/bin/pip install torch==2.13.0 && runs/unsloth/bin/pip install "
            "'.[llama,unsloth]'"
        )


def agree(steps: Mapping[str, Step | Elsewhere]) -> None:
    """Take a step of each. Raises UserError where the loss before it, or the gradient's norm, is not hf's.

    Adapters change nothing before the first step, so that the loss is the base model's.
    """
    losses = {name: step.evaluate() for name, step in steps.items()}
    for step in steps.values():
        step()
    norms = {name: step.gradient_norm() for name, step in steps.items()}
    for what, found, tolerance in (("losses", losses, 1e-2), ("norms of gradients", norms, 5e-2)):
        if not all(abs(value - found["hf"]) <= tolerance * found["hf"] for value in found.values()):
            raise UserError(f"the backends disagree, nothing was timed: {what} {found}")


def interleaved(
    subject: str, shape: str, dtype: torch.dtype, functions: dict[str, Callable[[], Any]], bound: str,
    work: float, device: torch.device, rounds: int,
) -> list[Row]:  # fmt: skip
    """Rows of functions taken in turn after a warm-up, ratios to the first."""
    for function in functions.values():
        function()
    ceilings = Ceilings(device, [dtype], [bound])
    seconds = interleave(functions, ceilings, rounds)
    limit, first = ceilings.limit(bound, dtype), next(iter(functions))
    return [
        make_row(subject, name, shape, dtype, device, own, limit, work, against={first: seconds[first]})
        for name, own in seconds.items()
    ]


def decoding(path: Path, method: str, device: torch.device, rounds: int) -> list[Row]:
    """Rows of NEW_TOKENS greedy tokens: transformers, ours without cache, ours; in ms for all of them.

    The ceiling is reading the weights once for every token.
    """
    dtype = pick_dtype("auto", device)
    ours: Any = TapelmBackend().load(path, Recipe(method), dtype, device).eval()
    theirs: Any = (
        open_base(path, dtype).to(device)
        if method == "lora"
        else get_backend("hf").load(path, Recipe(method), dtype, device).get_base_model()  # type: ignore[operator]
    )
    theirs.eval()
    prompt = np.random.default_rng(0).integers(0, ours.config.vocab_size, PROMPT_TOKENS).tolist()
    ids = torch.tensor([prompt], device=device)

    def transformers() -> Any:
        with torch.no_grad():
            return theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, do_sample=False,
            )  # fmt: skip

    def cached(use_cache: bool) -> Any:
        return generate(ours, [prompt], max_new_tokens=NEW_TOKENS, use_cache=use_cache)

    functions: dict[str, Callable[[], Any]] = {
        "transformers": transformers,
        "tapelm, no cache": lambda: cached(False),
        "tapelm": lambda: cached(True),
    }
    check_logits(path, ours, theirs, prompt)
    shape = f"{PROMPT_TOKENS} + {NEW_TOKENS}"
    read = model_bytes(ours) * NEW_TOKENS
    made = interleaved(f"decode {method}", shape, dtype, functions, "copy", read, device, rounds)
    for row in made:
        row.extra["ms_per_token"] = row.median_ms / NEW_TOKENS
    return made


def check_logits(path: Path, ours: Any, theirs: Any, prompt: list[int]) -> None:
    """The next token's logits after the prompt: ours err, beside transformers, at most as TOLERANCES allow.

    Exact are those of float32 over the weights as they are, for NF4 dequantized. Whatever transformers does,
    an error of 5% is too much.
    """
    exact: Any = open_base(path, torch.float32).eval()
    for name, adapter in TapelmBackend().adapters(ours).items():
        exact.get_submodule(name).weight.data = adapter.dense_weight().float().cpu()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        expected = exact(ids).logits[0, -1]
        their_logits = theirs(ids.to(theirs.device)).logits[0, -1].float().cpu()
    our_logits = Decoder(ours, [prompt], 1, use_cache=True).logits()[0].float().cpu()
    our_error, their_error = (
        float((logits - expected).norm() / expected.norm()) for logits in (our_logits, their_logits)
    )
    factor, slack = TOLERANCES[ours.dtype]
    if not our_error <= min(0.05, factor * their_error + slack):
        raise UserError(
            f"decoded logits are off by {our_error:.2g} of their norm, those of transformers by "
            f"{their_error:.2g}: nothing was timed"
        )


def peak_memory(build: Callable[[], Step], python: Path) -> int:
    """Peak bytes of a new process that loads a model and takes two steps."""
    step = Elsewhere(build, python=python)
    for _ in range(2):
        step()
    peak = step.peak_memory()
    step.close()
    return peak

"""Who computes: `tapelm` (transformers with our kernels), `hf` (peft and bitsandbytes) or `unsloth`.

A backend makes a model of a Hugging Face directory and a recipe, and is asked for losses, logits, adapters
and an optimizer; training, checks, generation and benchmarks know no more of it than this protocol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import tapelm
from gpt import extras
from gpt.cli import UserError
from gpt.ops import ClippedAdamW
from llama_lora import adapters as files
from llama_lora.adapters import Adapter, Recipe
from llama_lora.config import FinetuneConfig
from llama_lora.dataset import IGNORED
from llama_lora.modules import LoraLinear
from llama_lora.packing import PackedBatch
from tapelm.hf import document_mask


class Backend(Protocol):
    """See the module's text. A model is whatever `load` returned."""

    name: str

    def load(self, path: Path, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Base and fresh adapters, `lora_b` zero; only what trains requires a gradient."""
        ...

    def loss(self, model: Any, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy over the learned targets, a float32 scalar."""
        ...

    def logits(self, model: Any, batch: PackedBatch) -> Tensor:
        """(B, T, V)."""
        ...

    def adapters(self, model: Any) -> dict[str, Adapter]:
        """By layer name as in the base model, in its order; empty when all weights train."""
        ...

    def optimizer(self, model: Any, config: FinetuneConfig) -> torch.optim.Optimizer:
        """AdamW whose step() clips and leaves the norm in `grad_norm`."""
        ...


def get_backend(name: str) -> Backend:
    return {"tapelm": TapelmBackend, "hf": HuggingFaceBackend, "unsloth": UnslothBackend}[name]()


def open_config(path: Path) -> Any:
    """The configuration of a Llama model directory. Raises UserError naming what to do without one."""
    library = extras.transformers()
    if not (path / "config.json").is_file():
        raise UserError(
            f"no model in {path}: pass --model with a local copy of a Llama model (a directory with "
            "config.json and safetensors), or get a small one with python -m llama_lora.fetch"
        )
    try:
        config = library.AutoConfig.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}/config.json cannot be read: {error}") from error
    if config.model_type != "llama":
        raise UserError(f"{path} holds a {config.model_type} model; only Llama models are supported")
    return config


def open_base(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A LlamaForCausalLM without gradients. Raises UserError for a directory without usable weights."""
    open_config(path)
    library = extras.transformers()
    try:
        model = library.LlamaForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load the weights in {path}: {error}") from error
    return model.requires_grad_(False)


def open_tokenizer(path: Path) -> Any:
    try:
        return extras.transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {path}: copy tokenizer.json and its configuration there") from error


class TapelmBackend:
    """transformers' model with the modules of its blocks exchanged for ours."""

    name = "tapelm"

    def load(self, path: Path, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return self.equip(open_base(path, dtype), recipe).to(device)

    def equip(self, model: Any, recipe: Recipe) -> nn.Module:
        """Exchange the modules of a LlamaForCausalLM in place."""
        if model.config.attention_bias or model.config.mlp_bias or model.config.hidden_act != "silu":
            raise UserError("the tapelm backend needs linear layers without bias and SiLU; use --backend hf")
        tapelm.hf.optimize(model, fused_loss=False)
        if recipe.method == "full":
            return model.requires_grad_(True)
        for layer in model.model.layers:  # each is freed before the next
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if name in recipe.target_modules:
                        adapted = LoraLinear(
                            linear.weight, recipe.rank, recipe.scaling, quantize=recipe.method == "qlora"
                        )
                        setattr(parent, name, adapted)
        return model

    def hidden(self, model: Any, batch: PackedBatch) -> Tensor:
        return model.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False,
            attention_mask=document_mask(batch.document_ids),
        ).last_hidden_state  # fmt: skip

    def loss(self, model: Any, batch: PackedBatch) -> Tensor:
        return tapelm.linear_cross_entropy(
            self.hidden(model, batch), model.lm_head.weight, batch.targets, ignore_index=IGNORED
        )

    def logits(self, model: Any, batch: PackedBatch) -> Tensor:
        return model.lm_head(self.hidden(model, batch))

    def adapters(self, model: Any) -> dict[str, Adapter]:
        return {
            name: Adapter(module.lora_a, module.lora_b, module.dense_weight)
            for name, module in model.named_modules()
            if isinstance(module, LoraLinear)
        }

    def optimizer(self, model: Any, config: FinetuneConfig) -> torch.optim.Optimizer:
        return tapelm.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            state_bits=config.optimizer_bits,
        )


class HuggingFaceBackend:
    """The reference: peft's layers over bitsandbytes' NF4 or over dense weights, adapters in float32."""

    name = "hf"

    def load(self, path: Path, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> nn.Module:
        options: dict[str, Any] = {"device_map": {"": device}}
        if recipe.method == "qlora":
            extras.bitsandbytes()
            options["quantization_config"] = extras.transformers().BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = open_base(path, dtype, **options)
        never_repack(model)
        if recipe.method == "full":
            return model.requires_grad_(True)
        peft = extras.peft()
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,  # type: ignore[arg-type]
                target_modules=list(recipe.target_modules),
                task_type="CAUSAL_LM",
            ),
        )

    def loss(self, model: Any, batch: PackedBatch) -> Tensor:
        return model(
            input_ids=batch.ids, position_ids=batch.positions, labels=batch.targets,
            shift_labels=batch.targets, use_cache=False,
        ).loss  # fmt: skip

    def logits(self, model: Any, batch: PackedBatch) -> Tensor:
        return model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits

    def adapters(self, model: Any) -> dict[str, Adapter]:
        found = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                found[name.removeprefix(files.PREFIX)] = Adapter(
                    module.lora_A["default"].weight,
                    module.lora_B["default"].weight,
                    lambda base=module.base_layer: dense_weight_of(base),
                )
        return found

    def optimizer(self, model: Any, config: FinetuneConfig) -> torch.optim.Optimizer:
        return ClippedAdamW(
            [{"params": [p for p in model.parameters() if p.requires_grad]}],
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            max_grad_norm=config.max_grad_norm,
        )


def never_repack(model: nn.Module) -> None:
    """Keep bitsandbytes' layers from repacking their weights after a pass without gradients.

    It does so on CPUs with AVX512-BF16, and all gradients behind such a layer would be wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dense_weight_of(layer: Any) -> Tensor:
    """The weight (N, K) of a Linear or of bitsandbytes' Linear4bit."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    return extras.bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)


class UnslothBackend(HuggingFaceBackend):
    """Unsloth's patched model; what it leaves to peft and transformers is as in the reference."""

    name = "unsloth"

    def load(self, path: Path, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> nn.Module:
        language_model = extras.unsloth().FastLanguageModel
        open_config(path)
        model, _ = language_model.from_pretrained(
            model_name=str(path), dtype=dtype, load_in_4bit=recipe.method == "qlora",
            full_finetuning=recipe.method == "full",
        )  # fmt: skip
        never_repack(model)
        if recipe.method == "full":
            return model
        return language_model.get_peft_model(
            model, r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, bias="none",
            target_modules=list(recipe.target_modules), use_gradient_checkpointing=False,
        )  # fmt: skip

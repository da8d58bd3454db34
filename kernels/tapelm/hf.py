"""Causal language models of transformers on our kernels, one model at a time.

    model = tapelm.hf.optimize(AutoModelForCausalLM.from_pretrained(...))

exchanges the modules of this model in place; no class and no module of transformers is changed. Parameters,
state dict, configuration and what is saved stay what they are. Attention comes in as transformers wants it,
as the implementation "tapelm" of its AttentionInterface and AttentionMaskInterface. transformers is imported
by the first call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._hf_modules import GPT2MLP, NAME, Attention, document_mask, register, rms_norm_of
from .nn import TWINS, Linear, LMHead, RMSNorm, SwiGLU, exchange

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["Attention", "document_mask", "optimize", "rms_norm_of"]

LLAMA = {"RMSNorm": rms_norm_of, "MLP": SwiGLU.of, "Attention": Attention}
FAMILIES: dict[str, tuple[str, dict[str, Callable[[Any], nn.Module]]]] = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA),
    "gpt2": ("GPT2", {"MLP": GPT2MLP}),
}
"""model_type -> how the names of its classes begin, and the twins of those by the rest of their names."""
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how the names of models with our loss end


def check_supported(model: Any) -> None:
    """Raises ValueError, naming what it is, for a model that our kernels would not compute rightly."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES or type(model).__module__ != f"transformers.models.{kind}.modeling_{kind}":
        raise ValueError(
            f"optimize: {type(model).__name__} (model_type {kind!r}) is not supported; the models of "
            f"transformers that are: {', '.join(FAMILIES)}. tapelm.nn.optimize takes the modules "
            "of torch.nn in any model."
        )
    gelu = kind == "gpt2"
    activation = config.activation_function if gelu else config.hidden_act
    if activation not in (("gelu_new", "gelu_pytorch_tanh") if gelu else ("silu", "swish")):
        raise ValueError(
            f"optimize: the activation {activation!r} is not supported in a {kind} model; it must be "
            f"{'the tanh form of GELU' if gelu else 'SiLU'}."
        )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > 256 or (width % 2 and not gelu):
        raise ValueError(f"optimize: heads of {width} elements are not supported; at most 256, and even.")
    if getattr(config, "add_cross_attention", False):
        raise ValueError("optimize: cross-attention is not supported (config.add_cross_attention).")
    if not getattr(config, "is_causal", True):
        raise ValueError("optimize: bidirectional attention is not supported (config.is_causal is False).")
    if getattr(config, "output_attentions", False):
        raise ValueError("optimize: attention weights are never stored (config.output_attentions).")
    if getattr(model, "tp_size", None) is not None:
        raise ValueError("optimize: tensor parallel models are not supported; load it without tp_plan.")
    if "forward" in vars(model) and getattr(model.forward, "__module__", None) != __name__:
        raise ValueError(
            "optimize: forward of the model has been replaced, by another library or by hooks of accelerate; "
            "optimize it before that, or without it."
        )


def optimize(model: Model, *, fused_loss: bool = True) -> Model:
    """Exchanges the modules of a causal language model of transformers for ours, in place.

    These are norms, MLPs, attention with rotary positions, linear layers, dropout and the loss of Llama,
    Mistral, Qwen2, Qwen3 and GPT-2 models, forward and backward, on CPUs and GPUs. The model trains (Trainer,
    gradient checkpointing, peft before or after), generates, compiles, is pickled and saved as before.
    Attention is ``tapelm.attention``, also in generation, of prompts padded at the left too; PyTorch's
    computes it where windows are shorter than the text, behind a static cache, where a token is predicted
    from padding, and for padding in a compiled graph. In training labels at padding have to be -100, as what
    comes out there has no meaning. Dropout draws other masks than PyTorch's.

    Args:
        model: of class LlamaForCausalLM and its like, or a PeftModel around one; float32 or bfloat16, on CUDA
            also float16. The implementation of its attention becomes "tapelm".
        fused_loss: in training, with labels, compute the loss without logits, by
            ``tapelm.linear_cross_entropy``: ``logits`` are then None, in a tuple too. Not where a
            head of another kind (an adapter), another ``loss_function`` or ``logits_to_keep`` needs them.
            With labels, in evaluation too, a cache is made only where ``use_cache=True`` is passed; without
            one, documents that position_ids tell apart do not see each other, as in transformers. Pass False
            for trainers that read logits.

    Returns:
        ``model``.

    Raises:
        ValueError: a family, an activation or an option of the configuration that is not supported, or a
            model that another library has changed; by the model, when attention weights are asked for.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    check_supported(inner)
    from transformers.loss.loss_utils import ForCausalLMLoss

    prefix, by_name = FAMILIES[inner.config.model_type]
    module = importlib.import_module(type(inner).__module__)
    twins = TWINS | {getattr(module, prefix + name): make for name, make in by_name.items()}
    blocks = inner.config.num_hidden_layers
    for name in by_name:
        theirs = getattr(module, prefix + name)
        ours = {"RMSNorm": RMSNorm, "MLP": (SwiGLU, GPT2MLP), "Attention": Attention}[name]
        if sum(type(m) is theirs or isinstance(m, ours) for m in inner.modules()) < blocks:
            raise ValueError(
                f"optimize: fewer than {blocks} modules are {prefix}{name} of transformers; another library "
                "has changed them: make the model without it."
            )
    register()
    exchange(inner, twins)
    inner.set_attn_implementation(NAME)
    vars(inner).pop("forward", None)
    if fused_loss and type(inner).__name__.endswith(CAUSAL):
        if type(inner.lm_head) is Linear:
            inner.lm_head = LMHead.of(inner.lm_head)
        if inner.loss_function is ForCausalLMLoss:
            inner.loss_function = ForCausalLMLoss  # a GPT-2's is that by default, of which asking warns
        inner.forward = LossForward(inner)
    return model


class LossForward:
    """``forward`` of a causal language model by our loss, bound to it.

    It is called and wrapped as a MethodType is, but not pickled as one, which would give the class's own.
    """

    def __init__(self, model: Any) -> None:
        self.__self__ = model
        self.__func__ = with_loss(type(model).forward)

    def __call__(self, *positional: Any, **given: Any) -> Any:
        return self.__func__(self.__self__, *positional, **given)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(self.__func__, self.__self__))

    def __reduce__(self) -> tuple[type[LossForward], tuple[Any]]:
        return LossForward, (self.__self__,)


def with_loss(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The forward method of a causal language model, of which ``stock`` is the class's own, by our loss."""
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithPast

    signature = inspect.signature(stock)
    names = tuple(signature.parameters)[1:]

    def forward(self: Any, *positional: Any, **given: Any) -> Any:
        given = dict(zip(names, positional, strict=False)) | given
        if given.get("output_attentions"):
            raise ValueError(
                "attention weights are never stored by our kernels: leave out output_attentions."
            )
        labels, keep = given.get("labels"), given.get("logits_to_keep", 0)
        if labels is None:
            return stock(self, **given)
        if given.get("use_cache") is None and given.get("past_key_values") is None:
            leave_out_cache(given)
        resized = type(self.lm_head) is nn.Linear and "forward" not in vars(self.lm_head)
        if resized and not torch.compiler.is_compiling():
            self.lm_head = LMHead.of(self.lm_head)
        if (
            not self.training
            or type(self.lm_head) is not LMHead
            or self.loss_function is not ForCausalLMLoss
            or not isinstance(keep, int)
            or keep != 0
        ):
            return stock(self, **given)
        for name in ("labels", "logits_to_keep"):
            given.pop(name, None)
        return_dict = given.pop("return_dict", None)
        outputs = self.base_model(**given, return_dict=True)
        hidden, ignored = outputs.last_hidden_state, given.get("ignore_index", -100)
        targets = given.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        targets = targets.to(hidden.device).reshape(hidden.shape[:-1])
        loss = self.lm_head(hidden, targets, ignored)
        items = given.get("num_items_in_batch")
        if items is not None:  # the sum over this batch, which may have no target, of a mean over more
            count = (targets != ignored).sum()
            items = items.to(hidden.device) if isinstance(items, Tensor) else items
            loss = torch.where(count > 0, loss * count, 0.0) / items
        output = CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else (loss, None, *output.to_tuple()[1:])

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def leave_out_cache(given: dict[str, Any]) -> None:
    """Changes arguments of forward so that no cache is made, which documents in a row would see through.

    Padding of any length is cut or filled up to the tokens, as it is in transformers where there is a cache.
    """
    given["use_cache"] = False
    inputs, padding = given.get("input_ids"), given.get("attention_mask")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    if isinstance(padding, Tensor) and padding.ndim == 2 and isinstance(inputs, Tensor):
        given["attention_mask"] = F.pad(padding, (0, inputs.shape[1] - padding.shape[1]))

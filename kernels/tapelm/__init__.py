"""Fused training ops with a C++ kernel for CPUs and a Triton kernel for GPUs."""

from . import hf, nn
from ._tuning import use_table
from .adamw import AdamW
from .add_norm import add_layer_norm, add_rms_norm
from .attention import attention
from .bias_gelu import bias_gelu
from .dropout import dropout
from .embedding import embedding
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .loader import Batch, TokenLoader
from .lora_linear import lora_linear
from .memory import empty_cache, memory_stats
from .nf4 import NF4Weight, nf4_dequantize, nf4_quantize
from .rms_norm import rms_norm
from .rope import rope
from .shards import verify_shards, write_shards
from .swiglu import swiglu
from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Batch",
    "NF4Weight",
    "TokenLoader",
    "Tokenizer",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "dropout",
    "embedding",
    "empty_cache",
    "hf",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "memory_stats",
    "nf4_dequantize",
    "nf4_quantize",
    "nn",
    "rms_norm",
    "rope",
    "swiglu",
    "use_table",
    "verify_shards",
    "write_shards",
]

"""Fused training ops with a C++ kernel for CPUs and a Triton kernel for GPUs."""

from ._tuning import use_table as use_table
from .adamw import AdamW as AdamW
from .add_norm import add_layer_norm as add_layer_norm
from .add_norm import add_rms_norm as add_rms_norm
from .attention import attention as attention
from .bias_gelu import bias_gelu as bias_gelu
from .dropout import dropout as dropout
from .embedding import embedding as embedding
from .layer_norm import layer_norm as layer_norm
from .linear import linear as linear
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .loader import Batch as Batch
from .loader import TokenLoader as TokenLoader
from .lora_linear import lora_linear as lora_linear
from .nf4 import NF4Weight as NF4Weight
from .nf4 import nf4_dequantize as nf4_dequantize
from .nf4 import nf4_quantize as nf4_quantize
from .rms_norm import rms_norm as rms_norm
from .rope import rope as rope
from .shards import verify_shards as verify_shards
from .shards import write_shards as write_shards
from .swiglu import swiglu as swiglu
from .tokenizer import Tokenizer as Tokenizer

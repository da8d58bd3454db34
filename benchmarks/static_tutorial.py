"""The kernels of Triton's fused-attention tutorial, to compile beside ours.

The tutorial is python/tutorials/06-fused-attention.py in a checkout of Triton. As it wants a GPU when it is
imported, its kernels alone are taken from it, without their autotuner and its options for AMD.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gpt.cli import UserError
from tapelm._attention_configs import describable, launch_config
from tapelm._library import architecture

# What its launcher passes to the backward, whatever the GPU.
BACKWARD = {"BLOCK_M1": 32, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 32, "BLK_SLICE_FACTOR": 2}
BACKWARD_OPTIONS = {"num_warps": 4, "num_stages": 5}


def kernels(path: Path, folder: Path) -> dict[str, JITFunction]:
    """The tutorial's jit functions by name. Their source is written into ``folder``, which must outlive them.

    Raises:
        UserError: not the tutorial.
    """
    if not path.is_file():
        raise UserError(f"--tutorial {path} is not a file: give python/tutorials/06-fused-attention.py")
    try:
        return _taken(path, path.read_text(encoding="utf-8"), folder)
    except (UnicodeDecodeError, SyntaxError, NameError) as error:
        raise UserError(f"{path} is not the tutorial: {error}") from error


def _taken(path: Path, source: str, folder: Path) -> dict[str, JITFunction]:
    found = [
        ast.get_source_segment(source, node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)
    ]
    copy = folder / "tutorial.py"
    header = "import triton\nimport triton.language as tl\n\n\n"
    copy.write_text(header + "\n\n\n".join(f"@triton.jit\n{each}" for each in found) + "\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("tutorial", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    taken = {name: each for name, each in vars(module).items() if isinstance(each, JITFunction)}
    if missing := {"_attn_fwd", "_attn_bwd"} - taken.keys():
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}: it is not the tutorial")
    return taken


def _launch(kernel: JITFunction, values: dict[str, Any], **options: int) -> None:
    if unknown := [name for name in kernel.arg_names if name not in values]:
        raise UserError(
            f"the tutorial's {kernel.fn.__name__} wants {', '.join(unknown)}, which is not known here: "
            "take the tutorial of a Triton of about the version that is installed"
        )
    kernel[1, 1, 1](**{name: values[name] for name in kernel.arg_names}, **options)


def launch_forward(kernel: JITFunction, q: Tensor) -> None:
    """Its causal forward with the tile and warps of ours, for queries like q (B, H, T, D), which stands for
    keys and values too. Its autotuner, which wants a GPU, may choose another one or leave this one out.
    """
    batch, heads, time, width = q.shape
    ours = launch_config("forward", q.device, q.itemsize, width, False, describable(q))
    tile = {"BLOCK_M": ours["BLOCK_M"], "BLOCK_N": min(ours["BLOCK_N"], width)}

    def described(rows: int) -> Any:
        if not ours["DESCRIPTORS"]:
            return q
        return TensorDescriptor(q, [batch * heads * time, width], [width, 1], [rows, width])

    queries, keys = described(tile["BLOCK_M"]), described(tile["BLOCK_N"])
    values = {
        "sm_scale": 0.125, "M": q.new_empty(batch, heads, time, dtype=torch.float32), "Z": batch, "H": heads,
        "desc_q": queries, "desc_k": keys, "desc_v": keys, "desc_o": queries, "N_CTX": time,
        "HEAD_DIM": width, **tile, "FP8_OUTPUT": False, "STAGE": 3, "warp_specialize": False,
        "IS_HOPPER": architecture(q.device) == "sm_90",
    }  # fmt: skip
    _launch(kernel, values, num_warps=ours["num_warps"], num_stages=ours["num_stages"])


def launch_backward(kernel: JITFunction, q: Tensor) -> None:
    """Its causal backward (dq, dk and dv in one kernel) as its own launcher calls it."""
    batch, heads, time, width = q.shape
    row = q.new_empty(batch, heads, time, dtype=torch.float32)
    strides = dict(zip(("stride_z", "stride_h", "stride_tok", "stride_d"), q.stride(), strict=True))
    values = {
        **dict.fromkeys(("Q", "K", "V", "DO", "DQ", "DK", "DV"), q), "M": row, "D": row, "sm_scale": 0.125,
        **strides, "H": heads, "N_CTX": time, **BACKWARD, "HEAD_DIM": width, "CAUSAL": True,
    }  # fmt: skip
    _launch(kernel, values, **BACKWARD_OPTIONS)

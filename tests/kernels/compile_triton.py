"""Compiles the Triton kernels as they ship, without a GPU; prints registers and spilled bytes as JSON lines.

Run by test_triton_compile.py in a process of its own, because kernels imported for the interpreter cannot be
compiled:
    python compile_triton.py CAPABILITY[,CAPABILITY...] [LABEL_PREFIX...]
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tapelm import _attention_kernels as attention_kernels
from tapelm import _norm_kernels as norm_kernels
from tapelm.adamw import BLOCK as ADAMW_BLOCK
from tapelm.adamw import adamw_kernel, grad_norm_kernel
from tapelm.attention import FORWARD_CONFIGS, KEYS_CONFIGS, QUERIES_CONFIGS
from tapelm.attention import launch_config as attention_config
from tapelm.bias_gelu import BLOCK_COLS, BLOCK_ROWS, bias_gelu_backward_kernel, bias_gelu_forward_kernel
from tapelm.dropout import BLOCK as DROPOUT_BLOCK
from tapelm.dropout import dropout_kernel
from tapelm.linear_cross_entropy import CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_WARPS, cross_entropy_kernel
from tapelm.rope import launch_config as rope_config
from tapelm.rope import rope_kernel
from tapelm.swiglu import BLOCK as SWIGLU_BLOCK
from tapelm.swiglu import swiglu_backward_kernel, swiglu_forward_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ELEMENT = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
FLOATS = {"scale", "rescale", "eps", "beta1", "beta2", "decay", "step_size", "inverse_root_correction"}
POINTERS = {
    "lse_ptr": "fp32", "delta_ptr": "fp32", "mean_ptr": "fp32", "rstd_ptr": "fp32", "dweight_ptr": "fp32",
    "dbias_ptr": "fp32", "partial_ptr": "fp32", "losses_ptr": "fp32", "grad_scale_ptr": "fp32",
    "table_ptr": "i64", "targets_ptr": "i64", "valid_ptr": "i64", "seed_ptr": "i64", "documents_ptr": "i32",
}  # fmt: skip


def compile_kernel(kernel, capability: int, element: str, config: dict, absent: tuple[str, ...] = ()) -> dict:
    """Registers per thread and bytes of spill for one kernel whose tensors hold ``element``."""
    options = {key: config[key] for key in ("num_warps", "num_stages") if key in config}
    constants = {key: value for key, value in config.items() if key not in options}
    signature: dict = {}
    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            attributes.update({(index, part): [["tt.divisibility", 16]] for part in range(3)})
        elif name.endswith("_ptr"):
            signature[name] = "*" + POINTERS.get(name, element)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name in ("cols", "vocabulary", "numel"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    wide = len(
        re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg", compiled.asm["ptx"])
    )
    return {
        "registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared, "wide_loads": wide,
    }  # fmt: skip


def norm_configurations() -> list[tuple[str, object, dict, tuple[str, ...]]]:
    """Every combination of norm, addition and dropout, at widths that need different tiles."""
    k = norm_kernels
    add, drop = ("residual_ptr", "sum_ptr", "grad_sum_ptr"), ("seed_ptr", "dropped_ptr")
    centre = ("mean_ptr", "bias_ptr", "dbias_ptr")
    rows = []
    for op, absent in (
        ("layer_norm", (*add, *drop)),
        ("rms_norm", (*add, *drop, *centre)),
        ("add_norm layer", drop),
        ("add_norm rms", (*drop, *centre)),
        ("add_norm layer dropout", ()),
        ("add_norm rms dropout", centre),
    ):
        for cols in (64, 512, 768, 1024, 2048, 4096, k.NARROW_WIDTH):
            for way, kernel, config in (
                ("forward", k.norm_forward_kernel, k.forward_config(cols)),
                ("backward", k.norm_backward_kernel, k.backward_config(cols)),
            ):
                rows.append((f"{op} {way} {cols}", kernel, {**config, "ALIGNED": True}, absent))
        config = {**k.WIDE, "ALIGNED": True}
        rows.append((f"{op} forward wide", k.wide_norm_forward_kernel, config, absent))
        rows.append((f"{op} backward wide", k.wide_norm_backward_kernel, config, absent))
        rows.append((f"{op} weights wide", k.norm_weights_kernel, k.WEIGHTS, absent))
    return rows


def configurations(element: str) -> list[tuple[str, object, dict, tuple[str, ...]]]:
    """(label, kernel, config, arguments that are None) of all that ships, for tensors of ``element``."""
    k = attention_kernels
    size = ELEMENT[element].primitive_bitwidth // 8
    rows = []
    for width in (32, 64, 128, 256):
        for label, kernel, table in (
            ("forward", k.attention_forward_kernel, FORWARD_CONFIGS),
            ("keys", k.attention_backward_keys_kernel, KEYS_CONFIGS),
            ("queries", k.attention_backward_queries_kernel, QUERIES_CONFIGS),
        ):
            for suffix, absent in (
                ("", ("documents_ptr", "seed_ptr")),
                (" dropout", ("documents_ptr",)),
                (" documents", ("seed_ptr",)),
                (" both", ()),
            ):
                config = {**attention_config(table, size, width, bool(suffix)), "CAUSAL": True}
                rows.append((f"attention {label} {width}{suffix}", kernel, config, absent))
        delta = {"D": width, "BLOCK_D": width, "BLOCK_M": 32, "num_warps": 4}
        rows.append((f"attention delta {width}", k.attention_delta_kernel, delta, ()))
    rows += norm_configurations()
    config = {"BLOCK_R": BLOCK_ROWS, "BLOCK_C": BLOCK_COLS, "num_warps": 4}
    rows.append(("bias_gelu forward", bias_gelu_forward_kernel, config, ()))
    rows.append(("bias_gelu backward", bias_gelu_backward_kernel, config, ()))
    for way, kernel in (("forward", swiglu_forward_kernel), ("backward", swiglu_backward_kernel)):
        rows.append((f"swiglu {way}", kernel, {"BLOCK": SWIGLU_BLOCK, "num_warps": 4}, ()))
    for width in (32, 64, 80, 128, 256):
        rows.append((f"rope {width}", rope_kernel, {**rope_config(width), "INVERSE": True}, ()))
    rows.append(("dropout", dropout_kernel, {"BLOCK": DROPOUT_BLOCK, "num_warps": 4}, ()))
    config = {
        "NEED_GRAD": True, "BLOCK": CROSS_ENTROPY_BLOCK,
        "num_warps": CROSS_ENTROPY_WARPS,
    }  # fmt: skip
    rows.append(("cross_entropy", cross_entropy_kernel, config, ()))
    config = {"DTYPE": ELEMENT[element], "BLOCK": ADAMW_BLOCK, "num_warps": 4}
    rows.append(("grad_norm", grad_norm_kernel, config, ()))
    rows.append(("adamw", adamw_kernel, {**config, "HAS_MASTER": element != "fp32"}, ()))
    return rows


if __name__ == "__main__":
    chosen = sys.argv[2:] or [""]
    for capability in sys.argv[1].split(","):
        for element in ("bf16", "fp32"):
            for label, kernel, config, absent in configurations(element):
                if any(label.startswith(part) for part in chosen):
                    facts = compile_kernel(kernel, int(capability), element, config, absent)
                    row = {"kernel": label, "element": element, "capability": int(capability), **facts}
                    print(json.dumps(row), flush=True)

"""What a run executes on: device, precision, peak memory, the GEMM ceiling, names and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpt.cli import UserError
from gpt.config import TrainConfig

MOST_THREADS = 1024  # where OpenMP cannot start all it is told to, it ends the process


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA when there is one, else the CPU. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device {name!r} asked for, but PyTorch sees {count or 'no'} GPU: use --device cpu")
    return device


def set_threads(threads: int) -> None:
    """Pin the CPU threads of this process; 0 leaves PyTorch's default. Raises UserError out of range."""
    if threads < 0:
        raise UserError(f"--threads must not be negative, got {threads}")
    if threads > MOST_THREADS:
        raise UserError(f"--threads must be at most {MOST_THREADS}, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """config.precision with "auto" decided: bf16 for the optimized table where the hardware multiplies it."""
    if config.precision != "auto":
        return config.precision
    if config.kernels == "plain":
        return "fp32"
    return "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def device_name(device: torch.device) -> str:
    """The product name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads != 1 else ''}"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or resident in this process.

    On Linux this is VmHWM of the address space; getrusage would count the parent's memory from before exec.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak from what it holds now; the peak of a process cannot be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gemm_peak_flops(device: torch.device, precision: str, seconds: float = 0.25) -> float:
    """Best flops per second of square matrix products in the run's matmul dtype, measured in this process.

    Sizes double, five products each, until about `seconds` are spent, but up to 1024, as smaller products say
    nothing on a busy CPU; on CPUs of PyTorch's product and ours.
    """
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.mm]
    if device.type == "cpu":
        import tapelm

        products.append(tapelm.linear)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)  # the default one's state belongs to the run
    best, started = 0.0, time.perf_counter()
    for size in (2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        for product in 5 * products:
            synchronize(device)
            product_started = time.perf_counter()
            product(a, b)
            synchronize(device)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - product_started))
        if size >= 1024 and time.perf_counter() - started > seconds:
            break
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: machine, threads, date, commit and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_model": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": native_bf16(device),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES") or None,
        "load_average": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "command": _command(),
        "versions": versions(),
    }


def _command() -> str:
    """How this process was started, as one would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else shlex.quote(sys.argv[0])
    return f"python {program} {shlex.join(sys.argv[1:])}".strip()


def cpu_model() -> str:
    """Vendor, family and model of the CPU: product names are the same over generations."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = [
        re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("vendor_id", "cpu family", "model")
    ]
    if not all(found):
        return platform.machine()
    vendor, family, model = (match.group(1) for match in found if match)
    return f"{vendor} family {family} model {model}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
    for name in ("triton", "tapelm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""The torch.library handle: loads the extension that defines the ops; checks that all ops share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._shapes import shape_check

LIBRARY = torch.library.Library("tapelm", "FRAGMENT")

# The numeric types each device computes in; "meta" stands for either.
SUPPORTED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16),
}

# Triton launchers by op name, as registered for CUDA.
CUDA_LAUNCHERS: dict[str, Callable[..., Any]] = {}


def _load_extension() -> None:
    """Loads the ops.

    Raises:
        ImportError: they are not built, or for another release of torch, whose C++ interface is another.
    """
    folder, build = Path(__file__).parent, "run `pip install -e .` in the repository"
    found = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists()]
    if not found:
        raise ImportError(f"tapelm's compiled kernels are missing: {build}.")
    from ._text import TORCH_VERSION

    if not re.match(rf"{re.escape(TORCH_VERSION)}(?!\d)", torch.__version__):
        raise ImportError(
            f"tapelm was built for torch {TORCH_VERSION}, but torch {torch.__version__} is installed: "
            f"{build} to build it for that, or `pip install torch=={TORCH_VERSION}`."
        )
    torch.ops.load_library(found[0])


_load_extension()


def register_cuda(name: str, **shapes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a launcher as the CUDA kernel of ``tapelm::name``, run on the device of its first tensor.

    ``shapes`` of its tensors, as ``_shapes`` writes them, are checked at each call, because a kernel that is
    given a shorter tensor reads what lies behind it. Tests call the launcher that is returned on CPU tensors
    in Triton's interpreter.
    """

    def decorate(launch: Callable[..., Any]) -> Callable[..., Any]:
        check = shape_check(name, launch, shapes)

        @functools.wraps(launch)
        def checked(*args: Any) -> Any:
            check(args)
            return launch(*args)

        @functools.wraps(launch)
        def on_its_device(*args: Any) -> Any:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            with torch.cuda.device(first.device):
                return checked(*args)

        torch.library.register_kernel(f"tapelm::{name}", "cuda", on_its_device, lib=LIBRARY)
        CUDA_LAUNCHERS[name] = checked
        return checked

    return decorate


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers shapes, dtypes and strides of the outputs of ``tapelm::name``."""
    return torch.library.register_fake(f"tapelm::{name}", lib=LIBRARY)


def check_is_tensor(op: str, name: str, value: Any) -> None:
    """Raises TypeError, naming the argument, for what is no Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is of type {type(value).__name__}; it must be a Tensor.")


def check_tensors(op: str, optional_bias: Tensor | None = None, /, **tensors: Tensor) -> None:
    """Raises unless all tensors are on one supported device and of one supported dtype.

    Raises:
        TypeError: no tensor, a dtype that the device's kernels do not compute in, or dtypes that differ.
        ValueError: an unsupported device, or devices that differ.
    """
    named = tensors if optional_bias is None else {**tensors, "bias": optional_bias}
    first = None
    for tensor in named.values():  # one plain loop, because every call of every op runs it
        if not isinstance(tensor, Tensor):
            break
        if first is None:
            first, device, dtype = tensor, tensor.device, tensor.dtype
        elif tensor.dtype != dtype or tensor.device != device:
            break
    else:
        if first is not None and dtype in SUPPORTED_DTYPES.get(_device_type(first), ()):
            return
    first_name, first = next(iter(named.items()))
    for name, tensor in named.items():
        check_is_tensor(op, name, tensor)
    device, dtype = first.device, first.dtype
    supported = SUPPORTED_DTYPES.get(device.type, ())
    if not supported:
        raise ValueError(f"{op}: {first_name} is on {device}; move it to cpu or cuda.")
    for name, tensor in named.items():
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first_name} is on {device}.")
        if tensor.dtype not in supported:
            names = ", ".join(str(each).removeprefix("torch.") for each in supported)
            raise TypeError(f"{op}: {name} is {tensor.dtype}; on {device.type} use one of {names}.")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {first_name} is {dtype}; cast one.")


def _device_type(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else tensor.device.type  # .type builds a str on every call


def check_probability(op: str, name: str, p: float) -> None:
    """Raises TypeError for what is no number and ValueError unless 0 <= p < 1."""
    if not isinstance(p, (float, Real)):  # float first: to ask an abstract class takes 0.2 us
        raise TypeError(f"{op}: {name} is of type {type(p).__name__}; it must be a number in [0, 1).")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: {name} is {p}; it must be in [0, 1).")


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``; it knows no meta device. What is no tensor is left
    to ``check_tensors``."""
    if not isinstance(tensor, Tensor):
        return False
    device_type = _device_type(tensor)
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in ``dtype``. What is no tensor is left to ``check_tensors``."""
    return tuple(tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as torch's own matmuls do."""
    first = tensors[0]
    if first is None or not autocast_is_on(first):
        return tensors
    return cast(torch.get_autocast_dtype(_device_type(first)), *tensors)


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed on ``device``, which ``torch.manual_seed`` governs; drawing does not synchronise."""
    return torch.randint(0, 2**62, (), dtype=torch.int64, device=device)


# The architecture assumed for tensors that are on no GPU. The interpreter accepts any; ahead-of-time
# compilation sets each target in turn.
_assumed_architecture = "sm_80"


def architecture(device: torch.device) -> str:
    """The GPU's instruction set as compilers call it: "sm_90", "gfx942"."""
    if device.type != "cuda":
        return _assumed_architecture
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


# GPUs that no launch configuration is proven for take those of the one whose registers, shared memory and
# instructions they share.
RELATIVES = {"sm_87": "sm_86", "sm_103": "sm_100", "sm_120": "sm_89", "sm_121": "sm_89"}


def configured_architecture(device: torch.device) -> str:
    """The one by whose name launch configurations for ``device`` are kept: its own or its relative's."""
    name = architecture(device)
    return RELATIVES.get(name, name)


@contextmanager
def assumed_architecture(name: str) -> Iterator[None]:
    """Within it, launchers given tensors that are on no GPU choose the configuration of ``name``."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, name
    try:
        yield
    finally:
        _assumed_architecture = before


def next_power_of_2(size: int) -> int:
    """The least power of two not below ``size``; Triton's own is typed as part of a kernel."""
    return 1 << max(size - 1, 0).bit_length()


def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; a usual number of them for meta tensors, whose launches are compiled
    only, and a small one for CPU tensors in Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 128 if device.type == "meta" else 2

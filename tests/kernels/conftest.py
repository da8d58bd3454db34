"""Kernel tests run on each implementation: the C++ kernels, and Triton on the GPU or in its interpreter."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from tapelm.testing import check_op, interpreted_triton

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["cpu", "cuda" if torch.cuda.is_available() else "interpreter"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param != "interpreter":
        yield torch.device(request.param)
        return
    with interpreted_triton():
        yield torch.device("cpu")


@pytest.fixture
def check(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., None]:
    """``check_op``, without repetitions in the interpreter, which is slow and sequential."""
    return partial(check_op, repeat=request.node.callspec.params["device"] != "interpreter")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, which goes back to what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(1234)
    else:  # where that keeps a stack trace of each call for a GPU that may come
        torch.default_generator.manual_seed(1234)

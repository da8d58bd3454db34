"""Nothing is read beyond the end of a tensor: each ends where the next page cannot be read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tapelm  # noqa: F401  registers the ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
ops = torch.ops.tapelm
NORM_EPS = 1e-5


class Guard:
    """Copies of tensors before pages that end the process when they are read."""

    def __init__(self) -> None:
        self._mapped: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        room = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        mapped = mmap.mmap(-1, room + 4 * mmap.PAGESIZE)
        self._mapped.append(mapped)
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        libc = ctypes.CDLL(None, use_errno=True)
        protected = libc.mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(4 * mmap.PAGESIZE), 0)
        assert protected == 0, ctypes.get_errno()
        guarded = torch.frombuffer(
            mapped, dtype=torch.uint8, count=tensor.nbytes, offset=room - tensor.nbytes
        )
        return guarded.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def norm(x: Tensor, y: Tensor, row: Tensor, other: Tensor) -> list[Tensor]:
    result, r, mean, rstd = ops.add_norm_forward(x, y, row, other, NORM_EPS, 0.0, None)
    return [result, r, *ops.add_norm_backward(x, y, y, row, mean, rstd, 0.0, None)]


def attention(x: Tensor, y: Tensor) -> list[Tensor]:
    """Of the last two rows to all, as in decoding, and of all to all."""
    k, v, results = x[None, None], y[None, None], []
    for q in (k[:, :, -2:], k):
        out, lse = ops.attention_forward(q, k, v, True, 0.1, 0.0, None, None)
        results += [out, lse, *ops.attention_backward(out, q, k, v, out, lse, True, 0.1, 0.0, None, None)]
    return results


OPS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "bias_gelu": lambda x, y, row, _: [
        ops.bias_gelu_forward(x, row), *ops.bias_gelu_backward(y, x, row),
    ],
    "swiglu": lambda x, y, *_: [ops.swiglu_forward(x, y), *ops.swiglu_backward(y, x, y)],
    "dropout": lambda x, *_: [ops.dropout(x, 0.25, torch.tensor(3))],
    "add_norm": norm,
    "attention": lambda x, y, *_: attention(x, y),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_what_lies_behind_is_not_read(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 16, 63, 64, 127, 160, 191, 700):
        x, y = (torch.randn(5, columns, generator=generator).to(dtype) for _ in range(2))
        row, other = (torch.randn(columns, generator=generator).to(dtype) for _ in range(2))
        guard = Guard()
        for a, b in zip(OPS[name](*map(guard, (x, y, row, other))), OPS[name](x, y, row, other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

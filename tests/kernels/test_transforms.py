"""Every op under PyTorch's other transforms gives the gradients it gives without them, or one clear error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.op_cases import OP_CASES, OpCase

ROWS = 6
LINEAR = {"dropout", "rope"}
"""Their derivative is the op itself, which has one again."""


@pytest.fixture(params=OP_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(name: str) -> OpCase:
    return OP_CASES[name]


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """Not linear, so that gradients depend on the values."""
    return torch.stack([y.square().sum() / 2 for y in outputs]).sum()


def trained(leaves: list[Tensor]) -> list[int]:
    return [i for i, x in enumerate(leaves) if x.requires_grad]


def gradients(leaves: list[Tensor], outputs: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    torch.manual_seed(3)  # for the seeds of dropout
    return torch.autograd.grad(loss_of(outputs(*leaves)), [leaves[i] for i in trained(leaves)])


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_functional_gradients(name: str, case: OpCase) -> None:
    leaves = case.leaves(ROWS)
    expected, places = gradients(leaves, case.outputs), tuple(trained(leaves))
    torch.manual_seed(3)

    def loss(*inputs: Tensor) -> Tensor:
        return loss_of(case.outputs(*inputs))

    inputs = [x.detach() for x in leaves]
    assert_equal(torch.func.grad(loss, places)(*inputs), expected)
    # One sample at a time.
    both = [torch.stack([x, x]) for x in inputs]
    if name.startswith("lora_linear"):
        with pytest.raises(
            RuntimeError, match="Batching rule not implemented for tapelm::lora_linear_forward"
        ):
            torch.func.vmap(torch.func.grad(loss, places))(*both)
        return
    torch.manual_seed(3)
    found = torch.func.vmap(torch.func.grad(loss, places), randomness="same")(*both)
    assert_equal(tuple(each[1] for each in found), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_again_what_they_did(case: OpCase, reentrant: bool) -> None:
    """The seeds of dropout too."""
    leaves = case.leaves(ROWS)
    expected = gradients(leaves, case.outputs)
    torch.manual_seed(3)
    loss_of(checkpoint(case.outputs, *leaves, use_reentrant=reentrant)).backward()
    assert_equal(tuple(leaves[i].grad for i in trained(leaves)), expected)  # type: ignore[misc]


def test_saved_tensors_may_lie_elsewhere(case: OpCase) -> None:
    leaves = case.leaves(ROWS)
    expected = gradients(leaves, case.outputs)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(gradients(leaves, case.outputs), expected)


def test_vmap(name: str, case: OpCase) -> None:
    """Slice by slice, also backward."""
    leaves, others = case.leaves(ROWS), case.leaves(ROWS)
    for i in trained(others):
        others[i] = (others[i] * 0.5).detach().requires_grad_()
    mapped = torch.func.vmap(case.outputs, randomness="same")

    def stacked(*inputs: Tensor) -> tuple[Tensor, ...]:
        return mapped(*(torch.stack([x, y]) for x, y in zip(inputs, others, strict=True)))

    if name.startswith("lora_linear"):
        with pytest.raises(
            RuntimeError, match="Batching rule not implemented for tapelm::lora_linear_forward"
        ):
            stacked(*leaves)
        return
    torch.manual_seed(3)
    outputs = stacked(*leaves)
    for index, inputs in enumerate((leaves, others)):
        torch.manual_seed(3)
        assert_equal(tuple(y[index] for y in outputs), case.outputs(*inputs))
    if name == "linear_cross_entropy":  # which computes gradients together with the loss
        with pytest.raises(RuntimeError, match="under vmap differentiate within it"):
            gradients(leaves, stacked)
        return
    assert_equal(
        gradients(leaves, lambda *x: tuple(y[0] for y in stacked(*x))), gradients(leaves, case.outputs)
    )


def refused(name: str, what: str) -> AbstractContextManager[object]:
    return nullcontext() if name in LINEAR else pytest.raises(NotImplementedError, match=what)


def test_second_derivatives_are_right_or_refused(name: str, case: OpCase) -> None:
    leaves = case.leaves(ROWS)
    weights = [leaves[i] for i in trained(leaves)]
    torch.manual_seed(3)
    outputs = case.outputs(*leaves)
    first = torch.autograd.grad(loss_of(outputs), weights, create_graph=True)
    penalty = torch.stack([each.square().sum() for each in first]).sum()
    with refused(name, "second derivatives are not supported"):
        found = torch.autograd.grad(penalty, weights, retain_graph=True)
        # With J the constant Jacobian, the gradient is J'J x and that of its square 2 (J'J)'(J'J) x.
        again = torch.autograd.grad(outputs, weights, [y.detach() for y in outputs], retain_graph=True)
        torch.manual_seed(3)
        inputs = [x.detach() for x in leaves]
        for place, value in zip(trained(leaves), again, strict=True):
            inputs[place] = value.detach()
        twice = torch.autograd.grad(outputs, weights, [2 * y.detach() for y in case.outputs(*inputs)])
        assert_equal(found, twice)


def test_forward_mode_is_refused(case: OpCase) -> None:
    """Not a derivative of zero."""
    inputs = [x.detach() for x in case.leaves(ROWS)]
    place = trained(case.leaves(ROWS))[0]

    def of_one(x: Tensor) -> tuple[Tensor, ...]:
        return case.outputs(*inputs[:place], x, *inputs[place + 1 :])

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_one, (inputs[place],), (torch.ones_like(inputs[place]),))

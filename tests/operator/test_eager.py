"""Eager calls skip the registered operators; whatever traces or intercepts still meets them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastbound import bounded_linear
from fastbound.operator import autograd, ops
from fastbound.operator.block_function import bounded_mlp
from fastbound.truth.formula import Projection


class Seen(TorchDispatchMode):
    """The names of fastbound's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastbound":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Noticing(Tensor):
    """A subclass that is one by its __torch_dispatch__ alone."""

    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.names.append(str(func))
        with torch._C._DisableTorchDispatch():
            plain = [a.as_subclass(Tensor) if isinstance(a, Noticing) else a for a in args]
            return func(*plain, **(kwargs or {}))


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [5, 9], weight [7, 9], A [3, 9] and B [7, 3]."""
    torch.manual_seed(0)
    x, A, B = (nn.Parameter(torch.randn(*size)) for size in ((5, 9), (3, 9), (7, 3)))
    return x, torch.randn(7, 9), A, B


def gradients(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
    y = bounded_linear(x, weight, A, B, backend="torch")
    return torch.autograd.grad(y.square().sum(), (x, A, B))


def test_an_eager_call_meets_no_operator(
    operands: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("the operator was called")

    for name in ("forward", "backward"):
        monkeypatch.setattr(ops, name, autograd.direct(fail, getattr(ops, f"compute_{name}")))
    assert len(gradients(*operands)) == 3


def test_a_dispatch_mode_sees_the_operators_each_way(operands: tuple[Tensor, ...]) -> None:
    x, weight, A, B = operands
    expected = gradients(*operands)
    with Seen() as forward:
        y = bounded_linear(x, weight, A, B, backend="torch")
    with Seen() as backward:
        found = torch.autograd.grad(y.square().sum(), (x, A, B))
    assert (forward.names, backward.names) == (["forward"], ["backward"])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_dispatch_mode_sees_the_operators_of_a_block(operands: tuple[Tensor, ...]) -> None:
    x, weight, A, B = operands
    block = {"up": Projection(weight, None, A, B), "down": Projection(weight.t())}
    with Seen() as seen:
        bounded_mlp(x, **block, activation="gelu", backend="torch").sum().backward()
    assert seen.names == ["mlp_forward", "mlp_backward"]


@pytest.mark.parametrize("place", range(4), ids=["x", "weight", "A", "B"])
def test_a_tensor_subclass_sees_the_operator(operands: tuple[Tensor, ...], place: int) -> None:
    given = [t.detach() for t in operands]
    expected = bounded_linear(*given, backend="torch")
    given[place] = given[place].as_subclass(Noticing)
    Noticing.names.clear()
    y = bounded_linear(*given, backend="torch")
    assert "fastbound.forward.default" in Noticing.names
    assert torch.equal(y.as_subclass(Tensor), expected)


def test_fake_tensors_meet_the_operator_and_no_kernel(
    operands: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "rows", None)  # the implementation would call it
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in operands]
    assert gradients(*fake)[0].shape == (5, 9)


def test_a_trace_holds_the_operators(operands: tuple[Tensor, ...]) -> None:
    code = make_fx(gradients)(*operands).code
    assert "fastbound.forward.default" in code and "fastbound.backward.default" in code


def test_a_transform_takes_the_form_with_a_context(operands: tuple[Tensor, ...]) -> None:
    x, weight, A, B = (t.detach() for t in operands)

    def loss(A: Tensor) -> Tensor:
        return bounded_linear(x, weight, A, B, backend="torch").square().sum()

    _, expected, _ = gradients(*operands)
    torch.testing.assert_close(torch.func.grad(loss)(A), expected)


def test_the_eager_node_bears_the_functions_name(operands: tuple[Tensor, ...]) -> None:
    y = bounded_linear(*operands, backend="torch")
    assert y.grad_fn is not None and y.grad_fn.name() == "_BoundedLinearBackward"

"""Dropout of x inside layers: every backend takes the mask, and the gradients, of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastbound
from tests.support.models import Gated, stir, trained

M, K, N = 13, 45, 76  # K and N: several bytes of bits, the last 32-bit word not full


class Doubled(nn.Linear):
    """What computes x Wᵀ itself: the adapter goes over it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


KINDS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, int]]] = {
    "layer": (fastbound.FusedBoundedLinear, nn.Linear, (K, N)),
    "over a base": (fastbound.BoundedOverBase, Doubled, (K, N)),
    "block": (fastbound.FusedBoundedMLP, Gated, (None, K, N)),
}


def adapted(kind: str, backend: str, dropout: float) -> nn.Module:
    """The same weights and factors whatever the backend; in training mode."""
    made, plain, sizes = KINDS[kind]
    torch.manual_seed(0)
    adopt = made.from_mlp if kind == "block" else made.from_linear
    model = adopt(plain(*sizes), 5, bound=0.5, backend=backend, dropout=dropout)
    stir(model)
    return model.train()


def output_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    y.square().mean().backward()
    grads = {name: model.get_parameter(name).grad for name in trained(model)}
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (kind, backend)
        for kind in KINDS
        for backend in ("torch", "split", "fused")
        if (kind, backend) != ("over a base", "fused")  # refused: the base computes x Wᵀ
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_backend_takes_the_mask_of_the_reference(
    kind: str, backend: str, dropout: float
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    ours = output_and_gradients(adapted(kind, backend, dropout))
    expected = output_and_gradients(adapted(kind, "reference", dropout))
    assert ours.keys() == expected.keys() and len(ours) == (8 if kind == "block" else 4)
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_there(kind: str) -> None:
    """Or the comparison above would be of nothing."""
    with_it, without = (
        output_and_gradients(adapted(kind, "reference", dropout)) for dropout in (0.3, 0.0)
    )
    assert all(not torch.equal(with_it[name], without[name]) for name in without)

"""Ranks spread over layers by the gradients of forgetting and retaining."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbound
from fastbound.models.ranks import LowRank, allocate_ranks, components, gradients, spend


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9)).to(dtype)


LAYERS = {"0": (20, 12), "2": (9, 20)}


def losses(model: nn.Module, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, rows, 12, generator=generator, dtype=torch.float64)
    return model(x[0]).square().mean(), model(x[1]).abs().mean()


def test_the_sketch_is_the_gradient_where_its_rank_fits() -> None:
    model = network()
    loss, _ = losses(model)
    dense = torch.autograd.grad(loss, [model[0].weight, model[2].weight])
    sketched = gradients(model, LAYERS, lambda m: losses(m)[0], width=8, seed=3)
    for name, G in zip(LAYERS, dense, strict=True):
        Q, X = sketched[name]
        assert Q.shape[1] == 8 > torch.linalg.matrix_rank(G)
        # fp64; the small random matrix Psi Q that is inverted costs some digits
        torch.testing.assert_close(Q @ X, G, rtol=1e-9, atol=1e-12)


def test_a_sketch_too_small_keeps_the_leading_values() -> None:
    """Singular values that fall by halves: the largest is found to a percent from a width of 8."""
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(64, 20, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(40, 20, dtype=torch.float64))
    sigma = 0.5 ** torch.arange(20.0, dtype=torch.float64)
    layer = nn.Linear(40, 64, bias=False).double()
    model = nn.Sequential(layer)
    x = (V * sigma).t().contiguous()
    found = gradients(model, {"0": (64, 40)}, lambda m: (m(x) * U.t()).sum(), width=8, seed=0)["0"]
    values = torch.linalg.svdvals(found.X)
    torch.testing.assert_close(values[:3], sigma[:3], rtol=0.02, atol=0)


def test_several_backward_passes_add_up() -> None:
    model = network()
    x = torch.randn(5, 12, dtype=torch.float64)
    whole = gradients(model, LAYERS, lambda m: m(x).square().sum(), width=9, seed=0)
    parts = gradients(
        model, LAYERS, lambda m: (m(row).square().sum() for row in x), width=9, seed=0
    )
    for name in LAYERS:
        torch.testing.assert_close(whole[name].Q @ whole[name].X, parts[name].Q @ parts[name].X)


def test_a_component_that_retaining_shares_is_worth_nothing() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    forgotten = {"a": LowRank(eye, torch.diag(torch.tensor([3.0, 2, 1, 0]).double()))}
    kept = {"a": LowRank(eye, torch.diag(torch.tensor([5.0, 0, 0, 0]).double()))}
    worth = components(forgotten, kept, most=3)["a"]
    torch.testing.assert_close(worth, torch.tensor([0.0, 4 / 14, 1 / 14]).double())


def test_the_budget_goes_to_the_worthiest_per_parameter() -> None:
    worth = {
        "cheap": torch.tensor([9.0, 4.0, 0.1]),
        "dear": torch.tensor([9.0, 6.0, 5.0]),
    }
    costs = {"cheap": 10, "dear": 20}
    assert spend(worth, costs, 30) == {"cheap": 1, "dear": 1}
    assert spend(worth, costs, 40) == {"cheap": 2, "dear": 1}
    assert spend(worth, costs, 60) == {"cheap": 2, "dear": 2}
    assert spend(worth, costs, 59) == {"cheap": 3, "dear": 1}
    assert spend(worth, costs, 10_000) == {"cheap": 3, "dear": 3}


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    model.train()[1].eval()
    before = copy.deepcopy(model.state_dict())
    found = allocate_ranks(
        model,
        LAYERS,
        lambda m: losses(m)[0],
        lambda m: losses(m)[1],
        budget=6 * (32 + 29),
        most=9,
    )
    assert found.parameters <= found.budget
    assert set(found.ranks) == set(LAYERS)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False, True]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert f"of {found.budget:,} parameters" in str(found)


def test_a_budget_too_small_and_a_broken_loss_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="which takes 61"):
        allocate_ranks(model, LAYERS, lambda m: [], lambda m: [], budget=60)
    with pytest.raises(ValueError, match="not finite"):
        allocate_ranks(
            model,
            LAYERS,
            lambda m: losses(m)[0] * float("nan"),
            lambda m: losses(m)[1],
            budget=100,
        )


class TestInject:
    """`rank="auto"` and ranks by name."""

    @staticmethod
    def losses() -> dict[str, Any]:
        return {"forget": lambda m: losses(m)[0], "retain": lambda m: losses(m)[1]}

    def inject(self, model: nn.Module, rank: Any, **settings: Any) -> fastbound.InjectionReport:
        return fastbound.inject(model, rank, target_modules=["0", "2"], **settings)

    def test_auto_spends_the_budget_and_prints_its_choice(self) -> None:
        model = network()
        before = copy.deepcopy(model)
        report = self.inject(model, "auto", budget=300, alpha=6.0, **self.losses())
        assert report.allocation is not None and report.ranks == report.allocation.ranks
        assert 300 - 32 < report.allocation.parameters == report.trainable_parameters <= 300
        assert len(set(report.ranks.values())) == 2 and min(report.ranks.values()) >= 1
        assert str(report).endswith(str(report.allocation))
        for name, rank in report.ranks.items():
            adapter = model.get_submodule(name).adapter
            assert adapter.rank == rank
            assert adapter.alpha == 6.0
        x = torch.randn(3, 12, dtype=torch.float64)
        torch.testing.assert_close(model(x), before(x))

    def test_the_default_budget_is_that_of_rank_8(self) -> None:
        report = self.inject(network(), "auto", **self.losses())
        assert report.allocation is not None
        assert report.allocation.budget == 8 * (32 + 29)

    def test_ranks_survive_saving(self, tmp_path: Path) -> None:
        model = network()
        report = self.inject(model, "auto", budget=300, **self.losses())
        fastbound.save_adapter(model, tmp_path)
        assert fastbound.load_adapter(network(), tmp_path).ranks == report.ranks

    def test_ranks_by_name(self) -> None:
        model = network()
        report = self.inject(model, {"0": 2, "2": 5}, bound=3.0)
        assert report.ranks == {"0": 2, "2": 5} and report.allocation is None
        even = (2 * 32 + 5 * 29) / (32 + 29)
        assert [model.get_submodule(name).alpha for name in "02"] == [even, even]
        assert [model.get_submodule(name).bound for name in "02"] == [3, 3]

    @pytest.mark.parametrize(
        ("rank", "settings", "message"),
        [
            ("auto", {}, "give forget and retain, a function of the model"),
            ("auto", {"forget": lambda m: m}, "give retain, a function"),
            ("many", {}, "rank must be an integer, ranks by layer name, or \"auto\", got 'many'"),
            (4, {"budget": 100}, 'budget can only be given with rank="auto", but rank is 4'),
            ({"0": 2}, {}, "missing '2', unexpected none"),
            ({"0": 2, "2": 2, "3": 1}, {}, "unexpected '3'"),
            ({"0": 2, "2": 0}, {}, "rank must be"),
        ],
    )
    def test_bad_ranks_leave_the_model_as_it_was(
        self, rank: Any, settings: dict[str, Any], message: str
    ) -> None:
        model = network()
        with pytest.raises(ValueError, match=re.escape(message)):
            self.inject(model, rank, **settings)
        assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())

    def test_bad_settings_are_refused_before_the_passes(self) -> None:
        def never(model: nn.Module) -> Tensor:
            raise AssertionError("called")

        with pytest.raises(ValueError, match="alpha"):
            self.inject(network(), "auto", alpha=-1.0, forget=never, retain=never)

    def test_a_layer_that_cuts_gradients_off_is_named(self) -> None:
        class Cut(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                with torch.no_grad():
                    return super().forward(x)

        model = network()
        model[2] = Cut(20, 9).double()
        with pytest.raises(ValueError, match="2 receives no gradient"):
            self.inject(model, "auto", **self.losses())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_an_activation_in_place_after_the_first_layer(self) -> None:
        model = network()
        model[1] = nn.ReLU(inplace=True)
        report = self.inject(model, "auto", budget=300, **self.losses())
        assert report.allocation is not None and sum(report.ranks.values()) > 2


def test_the_sketch_does_not_depend_on_the_default_device() -> None:
    model, x = network(), torch.randn(6, 12, dtype=torch.float64)
    plain = gradients(model, LAYERS, lambda m: m(x).square().mean(), width=4, seed=3)
    with torch.device("meta"):
        found = gradients(model, LAYERS, lambda m: m(x).square().mean(), width=4, seed=3)
    for name in LAYERS:
        torch.testing.assert_close(found[name], plain[name])

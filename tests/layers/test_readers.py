"""Who reads a layer's weight instead of calling the layer is found, and nobody is suspected."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fastbound
from fastbound.layers.readers import weight_reader

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
BLOOM = {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2}
MODELS = {
    "torch attention": (lambda: nn.MultiheadAttention(16, 4), {"out_proj"}),
    "torch encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2),
        {"linear1", "linear2", "out_proj"},
    ),
    "torch decoder": (lambda: nn.TransformerDecoderLayer(16, 4, 32), {"out_proj"}),
    "mamba": (
        lambda: transformers.MambaModel(
            transformers.MambaConfig(
                vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
            )
        ),
        {"x_proj", "dt_proj", "out_proj"},
    ),
    "bloom": (lambda: transformers.BloomModel(transformers.BloomConfig(**BLOOM)), set()),
    "bloom, exact": (
        lambda: transformers.BloomModel(
            transformers.BloomConfig(**BLOOM, pretraining_tp=2, slow_but_exact=True)
        ),
        {"dense", "dense_4h_to_h"},
    ),
    "deberta": (
        lambda: transformers.DebertaModel(
            transformers.DebertaConfig(**SMALL, num_attention_heads=2)
        ),
        set(),
    ),
    "t5": (
        lambda: transformers.T5Model(
            transformers.T5Config(
                vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
            )
        ),
        set(),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_readers_of_known_models_are_found(model):
    build, wanted = MODELS[model]
    module = build()
    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    found = {name.rpartition(".")[2] for name in linear if weight_reader(module, name)}
    assert found == wanted


class Calls(nn.Module):
    """Asks about the weight, and calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.reset()

    def reset(self) -> None:
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            return F.linear(other, self.fc.weight)
        if isinstance(self.fc.weight, Tensor) and self.fc.weight is not None:
            x = x.to(self.fc.weight.dtype).reshape(-1, self.fc.weight.shape[1])
        return self.fc(x)


class Direct(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t()


class Inherited(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Overridden(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class ByMethod(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    @property
    def matrix(self) -> Tensor:
        return self._matrix()

    @torch.no_grad()
    def _matrix(self) -> Tensor:
        return self.fc.weight


class ByLocalName(Calls):
    def forward(this, x: Tensor) -> Tensor:
        layer = this.fc
        return F.linear(x, layer.weight)


class InTurn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleList([Calls(), Calls()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.inside:
            x = F.linear(x, part.fc.weight)
        return x


class BySetting(Calls):
    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight.t() if self.exact and not self.training else self.fc(x)


@pytest.mark.parametrize(
    ("owner", "reads"),
    [
        (Calls(), False),
        (Overridden(), False),
        (BySetting(exact=False), False),
        (BySetting(exact=True), True),
        (Direct(), True),
        (Inherited(), True),
        (ByMethod(), True),
        (ByLocalName(), True),
        (InTurn(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_reader_is_one_whose_forward_takes_the_values(owner, reads):
    name = next(n for n, m in owner.named_modules() if isinstance(m, nn.Linear))
    around = nn.Sequential(owner)
    reason = weight_reader(around, f"0.{name}")
    assert (reason is not None) is reads
    if reads:
        assert type(owner).__name__ in reason


def test_a_layer_that_is_read_under_another_name_is_found():
    model = nn.ModuleDict({"caller": Calls(), "reader": Direct()})
    model["reader"].fc = model["caller"].fc
    assert "read by the Direct around it" in weight_reader(model, "caller.fc")


def test_every_adapter_that_is_injected_runs():
    model = MODELS["mamba"][0]()
    report = fastbound.inject(model, 2, target_modules="all-linear")
    assert set(report.skipped) == {f"layers.0.mixer.{n}" for n in ("x_proj", "dt_proj", "out_proj")}
    assert report.replaced == ("layers.0.mixer.in_proj",)
    model(torch.arange(6)[None]).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_nothing_but_read_weights_is_refused_with_the_reason():
    layer = nn.TransformerEncoderLayer(16, 4, 32)
    with pytest.raises(ValueError, match="linear1: has its weight read by the TransformerEncoderL"):
        fastbound.inject(layer, 4, target_modules=["linear1", "linear2"])


def test_a_layer_that_a_user_put_where_it_is_read_is_explained():
    attention = nn.MultiheadAttention(16, 4)
    attention.out_proj = fastbound.BoundedOverBase.from_linear(attention.out_proj, 2)
    (row,) = fastbound.explain(attention)
    assert "read by the MultiheadAttention around it" in row.left_out
    assert f"LEFT OUT: {row.left_out}" in str(fastbound.explain(attention))
    assert fastbound.explain(nn.Sequential(attention.out_proj)).layers[0].left_out is None

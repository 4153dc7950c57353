"""Which forwards are MLP blocks, which activations are known: by what they say, not by a name."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastbound
from fastbound.layers.forms import Form, UnknownForm, activation_name, form_of
from tests.support.models import Gated, Packed, Plain, by_layers, fused

KNOWN = {
    "llama.LlamaMLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "mistral.MistralMLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "qwen2.Qwen2MLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "qwen3.Qwen3MLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "gemma.GemmaMLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "gemma2.Gemma2MLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "gemma3.Gemma3MLP": "down_proj(act_fn(gate_proj(x)) * up_proj(x))",
    "phi3.Phi3MLP": "down_proj(activation_fn(gate) * up, gate | up = gate_up_proj(x))",
    "gpt2.GPT2MLP": "dropout(c_proj(act(c_fc(x))))",
    "gpt_neo.GPTNeoMLP": "dropout(c_proj(act(c_fc(x))))",
    "gpt_neox.GPTNeoXMLP": "dense_4h_to_h(act(dense_h_to_4h(x)))",
    "phi.PhiMLP": "fc2(activation_fn(fc1(x)))",
    "vit.ViTMLP": "fc2(activation_fn(fc1(x)))",
}


@pytest.mark.parametrize("path", KNOWN)
def test_the_blocks_of_transformers_are_read(path):
    import importlib

    from fastbound.layers.forms import read_form

    model, name = path.split(".")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    assert str(read_form(getattr(module, name).forward)) == KNOWN[path]


def test_the_parts_of_each_form():
    assert form_of(Gated()) == Form("up", "down", "gate", "act")
    assert form_of(Plain()) == Form("first", "last", None, "act", ("drop",))
    assert form_of(Packed()) == Form("both", "down", "both", "act")
    assert form_of(Packed()).packed and not form_of(Plain()).packed
    assert form_of(Packed()).projections == ("both", "down")
    assert form_of(Gated()).projections == ("gate", "up", "down")


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (F.relu, "relu"),
    ],
)
@pytest.mark.parametrize("build", [Gated, Plain])
def test_every_activation_computes_what_its_module_does(build, act, name):
    block = fused(lambda: build(act)).eval()
    assert activation_name(block.act) == name
    x = torch.randn(5, 6)
    torch.testing.assert_close(block(x), by_layers(block)(x))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("relu2", None),
        ("leaky_relu", None),
    ],
)
def test_transformers_activations_are_told_by_what_they_compute(key, name):
    from transformers.activations import ACT2FN

    act = ACT2FN[key]
    assert activation_name(act) == name
    if name is not None:
        block = fused(lambda: Gated(act))
        x = torch.randn(5, 6)
        torch.testing.assert_close(block(x), by_layers(block)(x))


class _Side(Gated):
    def forward(self, x: Tensor) -> Tensor:
        self.note = "changed"
        return self.down(self.act(self.gate(x)) * self.up(x))


class _Unused(Gated):
    def forward(self, x: Tensor) -> Tensor:
        _lost = self.act(x)
        return self.down(self.act(self.gate(x)) * self.up(x))


class _Twice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.gate(x))


class _Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))


class _Swapped(Packed):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class _Options(Gated):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class _Between(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.act(self.first(x))))


class _Branching(Gated):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x
        return self.down(self.act(self.gate(x)) * self.up(x))


class _Called(Gated):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class _Decorated(Gated):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class _Patched(Gated):
    pass


@functools.wraps(Gated.forward)
def _wrapper(self: Gated, x: Tensor) -> Tensor:
    return -Gated.forward(self, x)


_Patched.forward = _wrapper


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_Side, "`self.note = 'changed'`"),
        (_Unused, "it calls more than its result needs"),
        (_Twice, "its terms are put together in another way"),
        (_Residual, "`x + self.down(self.act(self.gate(x)) * self.up(x))`"),
        (_Swapped, "its terms are put together in another way"),
        (_Options, "it takes more than x"),
        (_Branching, "`if self.training:`"),
        (_Called, "which has a __call__ of its own"),
        (_Decorated, "it is wrapped"),
        (_Patched, "it is wrapped"),
    ],
)
def test_another_forward_is_declined_by_what_it_says(kind, reason):
    with pytest.raises(UnknownForm, match=rf"^is a {kind.__name__}, .*{re.escape(reason)}"):
        form_of(kind())
    torch.manual_seed(0)
    model = nn.Sequential(kind()).eval()
    x = torch.randn(4, 6)
    expected = model(x)
    first = "both" if kind is _Swapped else "up"
    report = fastbound.inject(model, 2, target_modules=[first, "down"])
    assert report.fused == () and reason in report.unfused["0"]
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(TypeError, match="cannot be fused"):
        fastbound.FusedBoundedMLP(model[0])


def test_a_dropout_between_the_projections_is_declined():
    report = fastbound.inject(nn.Sequential(_Between()), 2, target_modules=["last"])
    assert report.unfused == {"0": "its drop is a Dropout"}


def test_a_forward_of_the_instance_and_one_without_source_are_declined():
    block = Gated()
    block.forward = block.forward
    with pytest.raises(UnknownForm, match="has a forward of its own"):
        form_of(block)
    namespace = {"Gated": Gated}
    exec(
        "class Made(Gated):\n"
        "    def forward(self, x):\n"
        "        return self.down(self.act(self.gate(x)) * self.up(x))\n",
        namespace,
    )
    with pytest.raises(UnknownForm, match="its source cannot be read"):
        form_of(namespace["Made"]())


def test_an_unknown_activation_is_named(tiny_model):
    report = fastbound.inject(nn.Sequential(Gated(nn.Tanh())), 2, target_modules=["up"])
    assert report.unfused == {
        "0": "its act is torch.nn.modules.activation.Tanh: "
        "the supported activations are silu, gelu, gelu_tanh, relu"
    }

"""MLP blocks under PEFT: one operator where one adapter is active, layer by layer elsewhere."""

from __future__ import annotations

import pytest
import torch
from models import example, gradients, logits
from peft import get_peft_model
from test_peft_method import adapted, stirred
from torch import nn

import fastbound

BLOCKS = {
    "llama": 2,
    "gpt2": 2,
    "gpt_neo": 2,
    "phi": 2,
    "gpt_neox": 2,
    "opt": 0,
    "qwen2": 2,
    "mistral": 2,
    "vit": 2,
}


@pytest.mark.parametrize(("model_type", "count"), BLOCKS.items())
def test_blocks_run_as_one_operator_with_the_results_of_their_layers(tiny_model, model_type, count):
    model = adapted(tiny_model(model_type))
    assert sum(block.fused for block in fastbound.explain(model).blocks) == count
    y, grads = gradients(model, **example(model))
    for module in model.modules():
        if isinstance(module, fastbound.FusedBoundedMLP):
            module.obstacle = lambda: "is asked to run layer by layer"
            module.forward = lambda x, m=module: m.fusion.block_class.forward(m, x)
    by_layers, expected = gradients(model, **example(model))
    torch.testing.assert_close(y, by_layers)
    assert set(grads) == set(expected) != set()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(grads[name], gradient)


def second(model: nn.Module) -> None:
    model.add_adapter("second", fastbound.BoundedConfig(r=2, init_weights=False))
    model.base_model.set_adapter(["default", "second"])


def hook(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(
        lambda module, args, output: output
    )


def merge(model: nn.Module) -> None:
    model.merge_adapter()


def disable(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (second, "its gate_proj has 2 active adapters"),
        (hook, "its up_proj has hooks or a forward of its own on its base"),
        (merge, "its gate_proj has 'default' merged into its weight"),
        (disable, "its gate_proj has its adapters disabled"),
    ],
)
def test_what_runs_layer_by_layer_says_why(tiny_model, change, reason):
    model = adapted(tiny_model("llama"))
    assert all(block.fused for block in fastbound.explain(model).blocks)
    change(model)
    explanation = fastbound.explain(model)
    assert reason in explanation.blocks[0].reason
    assert reason.partition(" ")[2].partition(" ")[2] in str(explanation)
    assert logits(model).isfinite().all()


def test_a_block_is_fused_again_when_one_adapter_is_left(tiny_model):
    model = adapted(tiny_model("llama"))
    y = logits(model)
    second(model)
    assert not any(block.fused for block in fastbound.explain(model).blocks)
    model.delete_adapter("second")
    assert all(block.fused for block in fastbound.explain(model).blocks)
    assert torch.equal(logits(model), y)


def test_an_adapter_on_some_projections_leaves_the_others_plain(tiny_model):
    model = adapted(tiny_model("llama"))
    model.add_adapter("down", fastbound.BoundedConfig(r=2, target_modules=["down_proj"]))
    model.set_adapter("down")
    stirred(model, "down")
    explanation = fastbound.explain(model)
    assert all(block.fused for block in explanation.blocks)
    plans = {row.layer.rpartition(".")[2]: row.plan.strategy for row in explanation}
    assert plans["up_proj"] == "base" and plans["down_proj"] != "base"
    expected = tiny_model("llama")
    with torch.no_grad():
        for index, layer in enumerate(expected.model.layers):
            there = model.base_model.model.model.layers[index].mlp.down_proj
            layer.mlp.down_proj.weight += there.get_delta_weight("down")
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-6)


def test_a_quantised_looking_base_is_called_and_added_to(tiny_model):
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Scaled(6, 5)),
        fastbound.BoundedConfig(r=2, bound=0.3, target_modules=["0"], init_weights=False),
    )
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    expected = 2 * (x @ layer.weight.t() + layer.bias) + x @ layer.get_delta_weight("default").t()
    torch.testing.assert_close(model(x), expected)
    (row,) = fastbound.explain(model)
    assert "it wraps a Scaled, so the base layer runs and each adapter is added" in row.plan.reason


def test_dropout_reaches_layers_with_two_adapters(tiny_model):
    model = adapted(tiny_model("llama"), dropout=0.5).train()
    second(model)
    torch.manual_seed(1)
    first = logits(model)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)

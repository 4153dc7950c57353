"""MLP blocks under PEFT: one operator where one adapter is active, layer by layer elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn

import fastbound
from fastbound.layers.bounds import bound_of_weight
from tests.support.models import example, gradients, logits
from tests.support.peft_models import adapted, stirred

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
        (hook, "its up_proj has a base with hooks or a forward of its own"),
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
    assert (
        "it wraps a Scaled, so the base layer runs and each adapter's term is added"
        in row.plan.reason
    )


def test_dropout_reaches_layers_with_two_adapters(tiny_model):
    model = adapted(tiny_model("llama"), dropout=0.5).train()
    second(model)
    torch.manual_seed(1)
    first = logits(model)
    assert not torch.equal(logits(model), first)
    torch.manual_seed(1)
    assert torch.equal(logits(model), first)


def test_the_whole_model_compiles_without_a_break(tiny_model):
    model = adapted(tiny_model("llama"))
    y, grads = gradients(model, **example(model))
    torch._dynamo.reset()
    compiled, again = gradients(
        torch.compile(model, backend="eager", fullgraph=True), **example(model)
    )
    torch.testing.assert_close(compiled, y)
    assert len(again) == len(grads) > 0


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_the_whole_model_compiles_without_gradients(tiny_model, without):
    model = adapted(tiny_model("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with without():
        torch.testing.assert_close(compiled(**example(model)).logits, logits(model))


@pytest.mark.slow
def test_generation_with_a_static_cache_compiles(tiny_model):
    model = adapted(tiny_model("llama")).eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    torch._dynamo.reset()
    tokens = model.generate(**example(model), cache_implementation="static", **settings)
    assert torch.equal(tokens, model.generate(**example(model), **settings))


def test_a_weight_flat_with_trained_parameters_runs_without_gradients_alone():
    """As in a unit of FSDP1 that holds both."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)), fastbound.BoundedConfig(r=2, target_modules=["0"])
    )
    base, x = model.base_model.model[0].base_layer, torch.randn(3, 6)
    with torch.no_grad():
        y = model(x)
    flat = torch.cat([base.weight.flatten(), torch.zeros(4)]).requires_grad_()
    del base.weight
    base.weight = flat[:30].view(5, 6)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match=r"auto_wrap_policy=peft\.utils\.other\.fsdp_auto_wrap"):
        model(x)


@pytest.mark.parametrize("active", [1, 2])
def test_under_autocast_it_agrees_with_itself_in_fp32(tiny_model, active):
    model = adapted(tiny_model("llama"))
    if active == 2:
        second(model)
    y = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logits(model)
    assert (rounded.float() - y).norm() / y.norm() < 2e-2


@pytest.mark.filterwarnings("ignore")
def test_a_4_bit_base_is_called_and_added_to(tiny_model, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    settings = {"r": 2, "target_modules": ["0"]}
    quantised = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32))
    quantised.load_state_dict(plain.state_dict())
    quantised.to("cpu")  # which is when it is quantised
    base = quantised.eval()(x)
    own = get_peft_model(copy.deepcopy(quantised), fastbound.BoundedConfig(**settings))
    weight = dequantize_module_weight(quantised[0])
    bound = own.base_model.model[0].fastbound_ab["default"].bound
    assert bound == pytest.approx(bound_of_weight("auto", weight))
    # A bound that was worked out on the plain weight serves the quantised one, too.
    model = stirred(get_peft_model(plain, fastbound.BoundedConfig(bound="auto", **settings)))
    delta = model.base_model.model[0].get_delta_weight("default")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised, tmp_path)
    torch.testing.assert_close(loaded(x), base + x @ delta.t())
    (row,) = fastbound.explain(loaded)
    assert "it wraps a Linear4bit" in row.plan.reason
    with pytest.raises(TypeError, match="floating dtype"):
        loaded.merge_adapter()


def test_a_base_that_gives_x_no_gradient_is_an_error_not_a_wrong_gradient():
    class Inference(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    model = get_peft_model(
        nn.Sequential(Inference(6, 5)), fastbound.BoundedConfig(r=2, target_modules=["0"])
    )
    model(torch.randn(3, 6)).sum().backward()  # x asks for nothing
    with pytest.raises(RuntimeError, match="Inference, gives x no gradient"):
        model(torch.randn(3, 6, requires_grad=True))

"""What the PEFT method refuses: a clear error first, and the model exactly as it was."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fastbound


def state(model: nn.Module) -> dict[str, object]:
    """Everything that a failed injection could leave behind, comparable by ==."""
    found: dict[str, object] = {name: id(module) for name, module in model.named_modules()}
    for name, p in model.named_parameters():
        found[f"{name} (parameter)"] = (id(p), p.dtype, p.requires_grad, p.tolist())
    found["attributes"] = sorted(vars(model))
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "rank must be >= 1, got 0"),
        ({"r": 2.5}, "rank must be an integer"),
        ({"alpha": -1}, "alpha must be positive"),
        ({"bound": "wide"}, "bound must be a positive number, None"),
        ({"bound": 0}, "bound must be positive"),
        ({"dropout": 1}, "dropout must be"),
        ({"bias": "some"}, "bias must be one of none, all, fastbound_only"),
        ({"rank_pattern": {"up_proj": 0}}, "rank must be >= 1"),
        ({"bound_pattern": {"up_proj": -2.0}}, "bound must be positive"),
        ({"format_version": 7}, "format_version 7"),
        ({"target_modules": ".*up", "layers_to_transform": [0]}, "layers_to_transform cannot"),
        ({"target_modules": ".*up", "layers_pattern": "layers"}, "layers_pattern cannot"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_settings_out_of_range_or_in_conflict(settings, message):
    with pytest.raises(ValueError, match=message):
        fastbound.BoundedConfig(**settings)


@pytest.mark.parametrize("field", ["rank", "scaling"])
def test_unknown_fields_are_named(field):
    with pytest.raises(TypeError, match=field):
        fastbound.BoundedConfig(**{field: 8})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["up_prjo"]}, "matches no module; near misses: up_proj"),
        ({"target_modules": ["embed_tokens"]}, "of class Embedding, .* trainable_token_indices"),
        ({"target_modules": ["mlp.act_fn"]}, "only linear layers"),
        ({"r": 129}, r"rank 129 of .*gate_proj is out of proportion"),
        ({"rank_pattern": {"up_proj": 999}}, r"rank 999 of .*up_proj is out of proportion"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: 'q_proj' matches none"),
        ({"alpha_pattern": {"nowhere": 4}}, "alpha_pattern: 'nowhere' matches none"),
        ({"bound_pattern": {"p_proj": 4}}, "bound_pattern: 'p_proj' matches none"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [99, 16]}}, "another model: .*up_proj"),
        ({"layers_to_transform": [5]}, r"layers_to_transform=\[5\] matches no module"),
        ({"trainable_token_indices": [3, 64]}, "the embedding has 64 rows, the last .* 63, got 64"),
        ({"trainable_token_indices": {"nowhere": [1]}}, "has no layer 'nowhere'"),
        # PEFT finds this one when the layers have been replaced.
        ({"target_modules": ["lm_head"], "modules_to_save": ["layers"]}, "cannot be applied to"),
    ],
)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "second"])
def test_a_failed_injection_leaves_the_model_as_it_was(tiny_model, settings, message, how):
    model = tiny_model("llama")
    if how == "second":
        model = get_peft_model(model, fastbound.BoundedConfig(r=2))
    before = state(model)
    config = fastbound.BoundedConfig(**{"r": 3, "bound": "auto", **settings})
    with pytest.raises((ValueError, TypeError), match=message):
        if how == "get_peft_model":
            get_peft_model(model, config)
        elif how == "second":
            model.add_adapter("second", config)
        else:
            from peft import inject_adapter_in_model

            inject_adapter_in_model(config, model, "one")
    assert state(model) == before
    if how == "second":
        assert list(model.peft_config) == ["default"]


def test_an_unknown_model_needs_target_modules(tiny_model):
    model = nn.Sequential(nn.Linear(4, 4))
    before = state(model)
    with pytest.raises(ValueError, match="Please specify `target_modules`: Sequential has no"):
        get_peft_model(model, fastbound.BoundedConfig())
    assert state(model) == before


def test_a_zero_weight_has_no_auto_bound(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    before = state(model)
    with pytest.raises(ValueError, match="non-zero weight"):
        get_peft_model(model, fastbound.BoundedConfig(bound="auto"))
    assert state(model) == before


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "up_proj"]])
def test_a_layer_with_a_lora_adapter(tiny_model, targets):
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["up_proj"]), tiny_model("llama"))
    before = state(model)
    with pytest.raises(ValueError, match="up_proj: it already holds another method's adapter"):
        inject_adapter_in_model(fastbound.BoundedConfig(target_modules=targets), model, "bounded")
    assert state(model) == before
    assert list(model.peft_config) == ["default"]


def test_a_lora_adapter_on_a_bounded_model(tiny_model):
    model = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=2))
    before = state(model)
    with pytest.raises((ValueError, TypeError)):
        model.add_adapter("lora", LoraConfig(target_modules=["up_proj"]))
    assert state(model) == before


def test_injected_and_peft_layers_do_not_mix(tiny_model, tmp_path):
    model = tiny_model("llama")
    fastbound.inject(model, rank=2)
    before = state(model)
    with pytest.raises(ValueError, match="was injected by fastbound"):
        get_peft_model(model, fastbound.BoundedConfig())
    assert state(model) == before
    fastbound.save_adapter(model, tmp_path)
    model = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=2))
    before = state(model)
    with pytest.raises(ValueError, match="bounded adapters of PEFT"):
        fastbound.inject(model)
    with pytest.raises(ValueError, match=r"save_pretrained\(folder\)"):
        fastbound.save_adapter(model, tmp_path / "no")
    with pytest.raises(ValueError, match=r"model.load_adapter\(folder, name\)"):
        fastbound.load_adapter(model, tmp_path)
    assert state(model) == before


def test_an_adapter_of_another_model(tiny_model, tmp_path):
    get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["shapes"]["model.layers.0.mlp.up_proj"] = [64, 16]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = tiny_model("llama")
    before = state(model)
    with pytest.raises(ValueError, match=r"up_proj is \[N, K\] = \[32, 16\] in the model and"):
        PeftModel.from_pretrained(model, tmp_path)
    assert state(model) == before


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (lambda base: None, "1 cannot be merged: its base is a Doubled with a forward of its own"),
        (
            lambda base: base.register_forward_hook(lambda module, inputs, output: 3 * output),
            "1 cannot be merged: forward hooks of its base .*: remove them",
        ),
    ],
)
def test_a_base_that_computes_more_than_its_weight_is_not_merged(disturb, message):
    kind = nn.Linear if "hooks" in message else Doubled
    model = nn.Sequential(nn.Linear(4, 6), kind(6, 6))
    adapted = get_peft_model(model, fastbound.BoundedConfig(r=2, target_modules=["1"]))
    layer = adapted.base_model.model[1]
    nn.init.normal_(layer.fastbound_ab["default"].B)
    disturb(layer.get_base_layer())
    before = layer.weight.clone()
    with pytest.raises(TypeError, match=message):
        adapted.merge_and_unload()
    assert torch.equal(layer.weight, before)

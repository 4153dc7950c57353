"""Several adapters of one model: their weighted sum, one for each row of a batch, their scale."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import fastbound
from tests.support.models import example, logits
from tests.support.peft_models import adapted, stirred


def two(tiny_model, model_type: str = "llama") -> PeftModel:
    """One adapter on the MLPs and one, of other rank, alpha and bound, on the up projections."""
    model = adapted(tiny_model(model_type))
    up = "c_fc" if model_type == "gpt2" else "up_proj"
    second = fastbound.BoundedConfig(r=2, alpha=5, bound=0.3, target_modules=[up])
    model.add_adapter("second", second)
    return stirred(model, "second", seed=3).eval()


def layers(model: nn.Module) -> dict[str, fastbound.BoundedLayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, fastbound.BoundedLayer)}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.5), (0.0, 2.0), (0.0, 0.0)])
def test_a_weighted_sum_is_one_adapter_exactly(tiny_model, tmp_path, model_type, weights):
    model = two(tiny_model, model_type)
    names = dict(zip(("default", "second"), weights, strict=True))
    model.add_weighted_adapter(list(names), list(weights), "sum")
    for layer in layers(model).values():
        terms = {n: layer.fastbound_ab[n] for n in names if n in layer.fastbound_ab}
        expected = sum(names[n] * layer.get_delta_weight(n).detach().double() for n in terms)
        delta = layer.get_delta_weight("sum")
        size = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(delta.double(), expected, rtol=0, atol=1e-6 * size)
        assert delta.abs().max() <= sum(abs(names[n]) * a.bound for n, a in terms.items()) + 1e-9
        shares = [abs(names[n]) * a.bound / a.rank for n, a in terms.items()]
        total = layer.fastbound_ab["sum"]
        assert total.rank == sum(a.rank for a in terms.values())
        if any(shares):
            assert total.bound == pytest.approx(max(shares) * total.rank)
    model.set_adapter("sum")
    y = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "sum")), y
    )


def test_adapters_alike_with_equal_weights_sum_to_the_sum_of_their_bounds(tiny_model):
    model = adapted(tiny_model("llama"), bound=0.2)
    model.add_adapter("second", fastbound.BoundedConfig(r=3, bound=0.2))
    model.add_weighted_adapter(["default", "second"], [0.5, -0.5], "sum")
    for layer in layers(model).values():
        assert layer.fastbound_ab["sum"].bound == pytest.approx(0.2)


def test_a_sum_is_inactive_and_can_be_trained(tiny_model):
    model = two(tiny_model)
    y = logits(model)
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum")
    assert torch.equal(logits(model), y)
    model.set_adapter("sum")
    model.train()(**example(model)).logits.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if ".sum." in n]
    assert grads and all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "svd"}, "combination_type='svd' does not give the sum .* only"),
        ({"adapters": ["default", "nope"]}, "Adapter 'nope' does not exist"),
        ({"adapters": ["default", "default"]}, "contains a name twice"),
        ({"weights": [1.0]}, "weights must have a finite number for each"),
        ({"weights": [1.0, math.inf]}, "weights must have a finite number for each"),
        ({"adapter_name": "second"}, "'second' already exists"),
    ],
)
def test_sums_that_are_refused_leave_the_model(tiny_model, arguments, message):
    model = two(tiny_model)
    before = {name: id(p) for name, p in model.named_parameters()}
    given = {"adapters": ["default", "second"], "weights": [1.0, 1.0], "adapter_name": "sum"}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{**given, **arguments})
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.peft_config) == ["default", "second"]


def test_what_was_trained_beside_an_adapter_is_in_no_sum(tiny_model):
    model = adapted(tiny_model("vit"), modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"modules_to_save=.* of 'default': weights trained"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_each_row_gets_the_adapter_of_its_name(tiny_model, model_type):
    model = two(tiny_model, model_type)
    inputs = {"input_ids": torch.randint(3, 60, (4, 7))}
    names = ["second", "__base__", "default", "second"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**inputs).logits
            else:
                model.set_adapter(name)
                alone = model(**inputs).logits
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_generation_keep_their_adapter(tiny_model, beams):
    model = two(tiny_model)
    settings = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    rows = torch.randint(3, 60, (2, 5))
    mixed = model.generate(input_ids=rows, adapter_names=["default", "second"], **settings)
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        assert torch.equal(mixed[row], model.generate(input_ids=rows, **settings)[row])


def test_rows_that_are_refused(tiny_model):
    model = two(tiny_model)
    inputs = example(model)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nope; there are default, "):
        model(**inputs, adapter_names=["default", "nope"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 1 and 2"):
        model(**inputs, adapter_names=["default"])
    with pytest.raises(TypeError, match="must be a list of names"):
        model(**inputs, adapter_names="default")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=["default", "second"])
    model.eval().merge_adapter(["default"])
    with pytest.raises(ValueError, match="there are merged adapters"):
        model(**inputs, adapter_names=["default", "second"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="alora_offsets"):
        model(**inputs, alora_offsets=[1, 1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_scale_multiplies_the_change_and_its_bound(tiny_model):
    model = adapted(tiny_model("llama"), bound=0.2)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    delta, s = layer.get_delta_weight("default"), layer.scaling["default"]
    layer.set_scale("default", -3)
    torch.testing.assert_close(layer.get_delta_weight("default"), -3 * delta)
    assert layer.scaling["default"] == pytest.approx(-3 * s)
    layer.scale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(-1.5 * s)
    layer.unscale_layer(0.5)
    assert layer.scaling["default"] == pytest.approx(-3 * s)
    layer.unscale_layer()
    assert layer.scaling["default"] == s
    layer.set_scale("another", 3)  # of other layers: as LoRA's
    base = logits(tiny_model("llama"))
    for each in layers(model).values():
        each.set_scale("default", 0)
    assert torch.equal(logits(model), base)


def test_a_scaled_block_runs_as_its_layers_do(tiny_model):
    model = adapted(tiny_model("llama"))
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    y = logits(model)
    assert all(block.fused for block in fastbound.explain(model).blocks)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), y, rtol=1e-5, atol=1e-6)


def test_a_scale_is_exported_but_not_saved(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    y = logits(model)
    fastbound.export_lora(model, tmp_path / "lora")
    exported = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    torch.testing.assert_close(logits(exported), y, rtol=1e-5, atol=1e-6)
    if Version(peft.__version__) < Version("0.21"):  # which does not ask the method when it saves
        return
    with pytest.warns(UserWarning, match=r"the scale of 'default' .* is not saved"):
        model.save_pretrained(tmp_path / "one")
    bounds = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["bound_pattern"]
    assert set(bounds.values()) == {m.fastbound_ab["default"].bound for m in layers(model).values()}


def test_scales_that_are_refused(tiny_model):
    layer = adapted(tiny_model("llama")).base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="scale must be finite"):
        layer.set_scale("default", math.nan)
    with pytest.raises(ValueError, match="scale must not be 0"):
        layer.unscale_layer(0)
    layer.merge()
    with pytest.raises(ValueError, match="merged into the weight"):
        layer.set_scale("default", 2)


def test_learning_rates_of_lora_plus_tell_B_from_A(tiny_model):
    model = adapted(tiny_model("llama"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == pytest.approx(16e-3 if name.endswith(".B") else 1e-3)


def test_helpers_that_are_loras_alone_say_so(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), "default")
    loras = pytest.raises(ValueError, match="only supported for models with `LoraLayer`s")
    with loras, rescale_adapter_scale(model, 0.5):
        pass
    with pytest.raises(ValueError, match="create_lorafa_optimizer corrects the gradient of LoRA's"):
        create_lorafa_optimizer(model, r=3, lora_alpha=3, lr=1e-3)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(), mixed=True)


def test_pefts_switch_of_input_casts_changes_nothing(tiny_model):
    model = adapted(tiny_model("llama"))
    y = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), y)


def test_tied_modules_to_save_stay_tied(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model = adapted(model, modules_to_save=["lm_head"], ensure_weight_tying=True)
    embedding, head = (
        m.modules_to_save["default"].weight
        for m in (model.base_model.model.transformer.wte, model.base_model.model.lm_head)
    )
    assert embedding is head
    with torch.no_grad():
        embedding.add_(0.1)
    y = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)), y)


def test_rows_of_an_embedding_are_trained_and_come_back(tiny_model, tmp_path):
    model = adapted(tiny_model("gpt2"), trainable_token_indices=[3, 7])
    deltas = model.base_model.model.transformer.wte.token_adapter.trainable_tokens_delta["default"]
    assert deltas.requires_grad and deltas.shape[0] == 2
    with torch.no_grad():
        deltas.add_(0.1)
    y = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)), y)
    with pytest.raises(ValueError, match="trainable_token_indices is"):
        fastbound.load_adapter(tiny_model("gpt2"), tmp_path)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, rtol=1e-5, atol=1e-6)


def test_explain_tells_the_bound_of_what_is_added(tiny_model):
    model = two(tiny_model)
    name, layer = next((n, each) for n, each in layers(model).items() if "up_proj" in n)

    def told():
        rows = fastbound.explain(model).layers
        return next(row.bound for row in rows if name.endswith(row.layer) or row.layer == name)

    bounds = [layer.fastbound_ab[each].bound for each in ("default", "second")]
    assert told() == pytest.approx(bounds[0])
    layer.set_scale("default", 5)
    assert told() == pytest.approx(5 * bounds[0])
    assert layer.get_delta_weight("default").abs().max() <= told()
    model.base_model.set_adapter(["default", "second"])
    assert told() == pytest.approx(5 * bounds[0] + bounds[1])
    change = sum(layer.get_delta_weight(each) for each in ("default", "second"))
    rows = fastbound.explain(model).layers
    used = next(r.bound_in_use for r in rows if name.endswith(r.layer) or r.layer == name)
    assert used == pytest.approx(float(change.square().mean().sqrt()) / told(), rel=1e-5)

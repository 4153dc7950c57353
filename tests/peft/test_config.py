"""BoundedConfig: LoRA's names of the same things, what is refused, what a file says of it."""

from __future__ import annotations

import json
import math
import pickle

import numpy
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

import fastbound
from tests.support.models import logits
from tests.support.peft_models import adapted, stirred

NAMES = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}


def test_a_script_for_lora_changes_one_name():
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "lora_only",
        "use_dora": False,
        "fan_in_fan_out": True,
        "task_type": TaskType.CAUSAL_LM,
    }
    config, theirs = fastbound.BoundedConfig(**settings), LoraConfig(**settings)
    assert (config.alpha, config.dropout, config.init_weights) == (16, 0.05, True)
    for name in NAMES:
        assert getattr(config, name) == getattr(theirs, name)
        assert name not in config.to_dict()
    config.lora_alpha = 32
    assert config.alpha == 32
    assert config.bias == "fastbound_only"


@pytest.mark.parametrize(
    ("theirs", "value", "other"),
    [("lora_alpha", 16, 8), ("lora_dropout", 0.1, 0.2), ("init_lora_weights", True, False)],
)
def test_two_names_of_one_thing_must_agree(theirs, value, other):
    name = NAMES[theirs]
    assert getattr(fastbound.BoundedConfig(**{theirs: value, name: value}), name) == value
    with pytest.raises(ValueError, match=f"{theirs}={value}.*{name}={other}.*give one of them"):
        fastbound.BoundedConfig(**{theirs: value, name: other})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_dora": True},
            "use_dora=True is an option of LoRA that bounded adapters do",
        ),
        (
            {"target_parameters": ["mlp.experts.down_proj"]},
            "target_parameters=.*3-D weights",
        ),
        ({"layer_replication": [(0, 2)]}, "layer_replication=.*replicate the layers"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be the index .* got '0'"),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names"),
        ({"target_modules": [3]}, "target_modules must be a list of names"),
        ({"target_modules": [""]}, "target_modules must be a list of names"),
        ({"rank_pattern": None}, "rank_pattern must be a dict of values by layer, got None"),
        ({"bound_pattern": ["up_proj"]}, "bound_pattern must be a dict of values by layer"),
        ({"trainable_token_indices": "3"}, "trainable_token_indices must be a list of rows"),
        ({"trainable_token_indices": {"wte": []}}, "trainable_token_indices must be a list of row"),
    ],
)
def test_what_it_does_not_have_is_named(settings, message):
    with pytest.raises(TypeError, match=message):
        fastbound.BoundedConfig(**settings)


@pytest.mark.parametrize("text", ["pissa", "gaussian", "False", 1, None])
def test_an_initialisation_that_there_is_not(text):
    with pytest.raises(ValueError, match=r"init_weights must be True \(B is zero .* or False"):
        fastbound.BoundedConfig(init_lora_weights=text)


@pytest.mark.parametrize("dropout", ["0.1", None, True, 1, -0.1])
def test_a_dropout_that_is_no_rate(dropout):
    with pytest.raises(ValueError, match="dropout must be a number, at least 0 and below 1"):
        fastbound.BoundedConfig(dropout=dropout)


def test_all_linear_and_whole_names_choose_no_layers_by_index(tiny_model):
    with pytest.raises(ValueError, match='target_modules is "all-linear": give a list of suffixes'):
        fastbound.BoundedConfig(target_modules="all-linear", layers_to_transform=[0])
    config = fastbound.BoundedConfig(
        target_modules=["model.layers.0.mlp.up_proj"], layers_to_transform=[1]
    )
    with pytest.raises(
        ValueError, match="layers_to_transform chooses among the layers of a suffix"
    ):
        get_peft_model(tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression: missing"),
        ({"exclude_modules": "*"}, r"exclude_modules '\*' is not a regular expression"),
        ({"alpha_pattern": {"(": 2.0}}, r"alpha_pattern: the key '\(' is not a regular"),
        ({"rank_pattern": {3: 2}}, "rank_pattern: the key 3 is not a regular expression"),
        ({"shapes": {"up_proj": 3}}, r"shapes of up_proj must be \[N, K\], got 3"),
        ({"alpha": 10**400}, "alpha must be positive and finite"),
    ],
)
def test_values_of_other_kinds_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        fastbound.BoundedConfig(**settings)


def test_custom_modules_are_refused_by_name():
    with pytest.raises(TypeError, match=r"only LoRA supports custom modules: .* got LSTM"):
        fastbound.BoundedConfig()._register_custom_module({nn.LSTM: nn.LSTM})


def test_numbers_of_numpy_and_torch_are_saved(tiny_model, tmp_path):
    config = fastbound.BoundedConfig(
        r=numpy.int64(3), alpha=numpy.float32(8), bound=torch.tensor(0.5), dropout=numpy.float64(0)
    )
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["alpha"], saved["bound"]) == (3, 8.0, 0.5)


@pytest.mark.parametrize("bound", [None, 0.4])
def test_rank_stabilised_alpha_is_the_slope_by_the_root_of_the_rank(tiny_model, tmp_path, bound):
    settings = {"r": 4, "alpha": 3.0, "bound": bound, "rank_pattern": {"down_proj": 9}}
    model = adapted(tiny_model("llama"), **settings, use_rslora=True)
    mlp = model.base_model.model.model.layers[0].mlp
    for layer, rank in ((mlp.up_proj, 4), (mlp.down_proj, 9)):
        adapter = layer.fastbound_ab["default"]
        assert adapter.scaling * adapter.omega**2 == pytest.approx(3 / math.sqrt(rank))
        assert adapter.bound == pytest.approx(3 * math.sqrt(rank) if bound is None else bound)
    model.save_pretrained(tmp_path)
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(
        logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model)
    )


def test_one_misspelt_target_among_several_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no module's name ends in 'v_porj'; near misses: v_proj"):
        adapted(tiny_model("llama"), target_modules=["q_proj", "v_porj"])


def test_what_hides_the_targets_is_named(tiny_model):
    with pytest.raises(ValueError, match=r"modules_to_save=\['mlp'\] matches no module"):
        adapted(tiny_model("llama"), modules_to_save=["mlp"])
    model = adapted(tiny_model("llama"))
    with pytest.raises(ValueError, match="linear layers end in: down_proj, gate_proj, k_proj, lm_"):
        model.add_adapter("second", fastbound.BoundedConfig(target_modules=["zzz"]))


def test_nothing_found_is_pefts_own_error(tiny_model):
    errors = pytest.importorskip("peft.utils.error", reason="PEFT 0.20 has no such class")
    with pytest.raises(errors.NoMatchingPeftModuleError, match="matches no module"):
        adapted(tiny_model("llama"), target_modules=".*nowhere")


def test_the_config_of_a_model_is_the_one_that_was_given(tiny_model, tmp_path):
    config = fastbound.BoundedConfig(r=2, bound="auto")
    model = get_peft_model(tiny_model("llama"), config)
    assert model.peft_config["default"] is config
    assert config.bound_pattern == {}
    stirred(model).save_pretrained(tmp_path)
    given = fastbound.BoundedConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config=given)
    assert loaded.peft_config["default"] is given
    assert torch.equal(logits(loaded), logits(model))
    assert pickle.loads(pickle.dumps(config)) == config


def test_one_config_on_two_models_saves_the_bounds_of_each(tiny_model, tmp_path):
    config = fastbound.BoundedConfig(r=2, bound="auto")
    other = tiny_model("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    models = {
        name: stirred(get_peft_model(base, config))
        for name, base in (("one", tiny_model("llama")), ("other", other))
    }
    bounds = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        bounds[name] = saved["bound_pattern"]["model.layers.0.mlp.up_proj"]
    assert bounds["other"] == pytest.approx(3 * bounds["one"])


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_of_tokens_and_answers_are_trained_beside_it(task_type):
    from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

    kind = {"TOKEN_CLS": BertForTokenClassification, "QUESTION_ANS": BertForQuestionAnswering}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    base = kind[task_type](BertConfig(vocab_size=64, num_attention_heads=2, **sizes))
    model = get_peft_model(base, fastbound.BoundedConfig(r=2, task_type=task_type))
    head = "classifier" if task_type == "TOKEN_CLS" else "qa_outputs"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(head in name for name in trained)
    assert sum("query" in name for name in trained) == 2  # of PEFT's table for BERT


def test_every_architecture_of_pefts_table_has_a_default():
    from fastbound.peft.method import BoundedModel

    for kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        assert BoundedModel.target_module_mapping[kind]
    assert BoundedModel.target_module_mapping["dinov2"] == ["query", "value"]


def test_a_second_adapter_on_all_linear_layers(tiny_model):
    model = adapted(tiny_model("llama"), target_modules="all-linear")
    model.add_adapter("second", fastbound.BoundedConfig(r=2, target_modules="all-linear"))
    layers = [m for m in model.modules() if isinstance(m, fastbound.BoundedLayer)]
    assert len(layers) == 14 and all("second" in layer.fastbound_ab for layer in layers)


def test_a_compiled_model_takes_the_layers_of_a_state_dict(tiny_model):
    config = {"r": 3, "bound": "auto"}
    state = get_peft_model_state_dict(adapted(tiny_model("llama")))
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    model = torch.compile(tiny_model("llama"), backend="eager")
    inject_adapter_in_model(fastbound.BoundedConfig(**config), model, state_dict=state)
    assert sum(isinstance(m, fastbound.BoundedLayer) for m in model.modules()) == 6


def test_an_adapter_follows_its_layers_to_other_names_in_the_middle(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    model.save_pretrained(tmp_path)

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.language_model = inner
            self.config = inner.config

        def forward(self, **inputs: object) -> object:
            return self.language_model(**inputs)

    base = tiny_model("llama")
    base.model = Wrapped(base.model)
    loaded = PeftModel.from_pretrained(
        base, tmp_path, key_mapping={r"^model\.layers": "model.language_model.layers"}
    )
    assert torch.equal(logits(loaded), logits(model))


def test_tied_layers_are_refused_by_name():
    net = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
    net["b"].weight = net["a"].weight
    with pytest.raises(ValueError, match="cannot adapt a: its weight is tied to b"):
        get_peft_model(net, fastbound.BoundedConfig(target_modules=["a", "b"]))


@pytest.mark.parametrize(
    ("layer", "remedy"),
    [
        (nn.Embedding(4, 4), "trainable_token_indices"),
        (nn.Conv1d(4, 4, 1), "train it whole with modules_to_save"),
        (nn.Conv2d(4, 4, 1), "train it whole with modules_to_save"),
        (nn.Conv3d(4, 4, 1), "train it whole with modules_to_save"),
        (nn.MultiheadAttention(4, 2), "it keeps q, k and v in one parameter"),
        (nn.ReLU(), "leave it out of target_modules"),
    ],
)
def test_layers_of_other_kinds_are_refused_with_a_remedy(layer, remedy):
    net = nn.ModuleDict({"it": layer, "linear": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=f"cannot adapt it: it is of class .*{remedy}"):
        get_peft_model(net, fastbound.BoundedConfig(target_modules=["it", "linear"]))


def test_a_layer_whose_weight_its_owner_reads_is_refused():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match="read by the MultiheadAttention around it"):
        get_peft_model(net, fastbound.BoundedConfig(target_modules=["out_proj"]))


def test_an_output_layer_that_shares_no_weight_can_be_adapted(tiny_model):
    model = tiny_model("llama")
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    y = logits(model)
    changed = logits(adapted(model, target_modules=["lm_head"]))
    assert changed.shape == y.shape and not torch.equal(changed, y)

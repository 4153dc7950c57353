"""What transformers saves of an injected model is that model, for whoever loads it again."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import fastbound
from tests.support.models import MLP, example, logits, stir

KINDS = {
    "gemma3": transformers.AutoModelForImageTextToText,
    "vit": transformers.ViTForImageClassification,
}


def injected(model: nn.Module, **settings) -> nn.Module:
    fastbound.inject(model, 4, bound=0.5, **settings)
    stir(model)
    return model


def reloaded(folder, model_type: str = "llama") -> nn.Module:
    kind = KINDS.get(model_type, transformers.AutoModelForCausalLM)
    return kind.from_pretrained(folder).eval()


QUICK = ("llama", "gpt2", "gpt_neox", "gemma3", "vit")  # each of a kind


EACH_KIND = pytest.mark.parametrize(
    "model_type",
    [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MLP],
)


@EACH_KIND
def test_an_injected_model_comes_back_as_it_was(tiny_model, tmp_path, model_type):
    base = logits(tiny_model(model_type))
    model = injected(tiny_model(model_type))
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    assert (wanted - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(reloaded(tmp_path, model_type)), wanted)


@EACH_KIND
def test_the_model_that_comes_back_is_merged_and_saved_as_a_plain_one(
    tiny_model, tmp_path, model_type
):
    """Though transformers, which loaded the adapter, writes the base under the adapter's names."""
    base = tiny_model(model_type)
    names = {name: type(module) for name, module in base.named_modules()}
    model = injected(tiny_model(model_type))
    model.save_pretrained(tmp_path / "injected")
    again = reloaded(tmp_path / "injected", model_type)
    with pytest.raises(ValueError, match=r"call fastbound\.merge\(model\) first"):
        fastbound.inject(again, 2)
    with (
        pytest.raises(ValueError, match="nothing to disable, and PEFT's adapters are disabled by"),
        fastbound.disable_adapter(again),
    ):
        pass
    merged = fastbound.merge(again)
    torch.testing.assert_close(logits(merged), logits(model))
    assert {name: type(module) for name, module in merged.named_modules()} == names
    merged.save_pretrained(tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    torch.testing.assert_close(logits(reloaded(tmp_path / "merged", model_type)), logits(model))


def test_nothing_of_a_model_that_came_back_is_merged_if_a_layer_cannot_be(tiny_model, tmp_path):
    injected(tiny_model("llama")).save_pretrained(tmp_path)
    again = reloaded(tmp_path)
    wanted = logits(again)
    last = again.model.layers[1].mlp.down_proj
    hook = last.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"down_proj' cannot be merged: forward hooks of its base"):
        fastbound.merge(again)
    hook.remove()
    with torch.no_grad():
        B = last.adapter.B
        kept, B[0, 0] = B[0, 0].clone(), float("nan")
        with pytest.raises(ValueError, match=r"down_proj' cannot be merged: W \+ ΔW is not finite"):
            fastbound.merge(again)
        B[0, 0] = kept
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_merged_model_is_saved_in_its_dtype(tiny_model, tmp_path, model_type, dtype):
    model = fastbound.merge(injected(tiny_model(model_type).to(dtype)))
    model.save_pretrained(tmp_path)
    again = reloaded(tmp_path, model_type)
    assert again.dtype is dtype
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name


def test_a_checkpoint_of_trainer_comes_back_with_its_adapter(tiny_model, tmp_path):
    tokens = torch.arange(3, 10)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[], save_steps=1
    )
    model = injected(tiny_model("llama"))
    data = [{"input_ids": tokens, "labels": tokens}] * 8
    transformers.Trainer(model, arguments, train_dataset=data).train()
    again = reloaded(tmp_path / "checkpoint-1")
    assert torch.equal(logits(again), logits(model.eval()))


def _deep_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("way", [_deep_copy, _pickled, _compiled])
def test_however_the_model_was_handed_on(tiny_model, tmp_path, way):
    model = way(injected(tiny_model("llama")))
    model.save_pretrained(tmp_path)
    wanted = logits(getattr(model, "_orig_mod", model))
    assert torch.equal(logits(reloaded(tmp_path)), wanted)


def test_a_model_inside_and_a_model_around_are_saved_with_their_adapters(tiny_model, tmp_path):
    whole = tiny_model("llama")
    fastbound.inject(whole.model, 4, target_modules=["down_proj"])
    stir(whole)
    whole.save_pretrained(tmp_path / "around")
    assert torch.equal(logits(reloaded(tmp_path / "around")), logits(whole))
    whole.model.save_pretrained(tmp_path / "inside")
    inside = transformers.AutoModel.from_pretrained(tmp_path / "inside").eval()
    wanted = whole.model(**example(whole)).last_hidden_state
    assert torch.equal(inside(**example(whole)).last_hidden_state, wanted)


def test_layers_over_a_base_are_saved_under_the_names_of_the_base(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert "model.layers.0.mlp.up_proj" in fastbound.inject(model, 4, bound=0.5).over_base
    stir(model)
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("own", "given"):
        torch.testing.assert_close(logits(reloaded(tmp_path / folder)), logits(model))


def test_a_given_state_is_what_is_saved(tiny_model, tmp_path):
    base = logits(tiny_model("llama"))
    model = injected(tiny_model("llama"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = logits(model)
    stir(model, 0.1)
    model.save_pretrained(tmp_path / "whole", state_dict=state)
    assert torch.equal(logits(reloaded(tmp_path / "whole")), wanted)
    plain = {name: tensor for name, tensor in state.items() if ".adapter." not in name}
    model.save_pretrained(tmp_path / "base", state_dict=plain)
    assert torch.equal(logits(reloaded(tmp_path / "base")), base)


@pytest.mark.slow  # a process of its own
def test_a_process_without_fastbound_is_told_what_it_lacks(tiny_model, tmp_path):
    injected(tiny_model("llama")).save_pretrained(tmp_path)
    code = f"import transformers; transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "KeyError: 'FASTBOUND'" in run.stderr


@pytest.mark.parametrize("first", ["save_pretrained", "save_adapter"])
def test_no_plain_model_is_saved_beside_an_adapter(tiny_model, tmp_path, first):
    model = injected(tiny_model("llama"))
    getattr(model, first)(tmp_path) if first in dir(model) else fastbound.save_adapter(
        model, tmp_path
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds an adapter of fastbound.*use another folder"):
        fastbound.merge(model).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("broken", ["push", "nan", "part"])
def test_what_cannot_be_saved_whole_is_refused_before_a_file_is_written(
    tiny_model, tmp_path, broken
):
    model = injected(tiny_model("llama"))
    settings, message = {}, "would upload the base without its adapter"
    if broken == "push":
        settings = {"push_to_hub": True}
    elif broken == "nan":
        message = "holds a NaN or an infinity: nothing is saved"
        model.model.layers[0].mlp.up_proj.adapter.A.data[0, 0] = float("nan")
    else:
        message = r"some factors but not 'model\.layers\.0\.mlp\.up_proj\.adapter\.B'"
        state = model.state_dict()
        del state["model.layers.0.mlp.up_proj.adapter.B"]
        settings = {"state_dict": state}
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_adapters_of_peft_beside_injected_layers_are_refused(tiny_model, tmp_path):
    model = injected(tiny_model("llama"))
    model._hf_peft_config_loaded = True  # what model.add_adapter(LoraConfig()) leaves
    with pytest.raises(ValueError, match="holds PEFT adapters beside injected layers"):
        model.save_pretrained(tmp_path)


def test_a_file_of_all_weights_is_refused_by_a_plain_model(tiny_model, tmp_path):
    model = injected(tiny_model("llama"))
    safetensors.torch.save_model(model, tmp_path / "all.safetensors")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        safetensors.torch.load_model(tiny_model("llama"), tmp_path / "all.safetensors")
    again = tiny_model("llama")
    fastbound.inject(again, 4)
    safetensors.torch.load_model(again, tmp_path / "all.safetensors")
    assert torch.equal(logits(again), logits(model))


def test_peft_does_not_save_a_model_without_its_injected_layers(tiny_model, tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("llama"), lora)
    injected(model)
    with pytest.raises(ValueError, match="holds injected layers beside its PEFT adapters"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    fastbound.save_adapter(model, tmp_path)
    plain = tiny_model("llama")
    fastbound.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))  # LoRA's B is 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(ValueError, match="q_proj holds an adapter of another method"):
        fastbound.export_lora(model, tmp_path / "lora")
    with model.disable_adapter():
        fastbound.export_lora(model, tmp_path / "lora")


@pytest.mark.parametrize(
    "beside",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 3]}, {"bias": "all"}],
    ids=str,
)
def test_what_was_trained_beside_the_adapter_is_merged_with_it(tiny_model, tmp_path, beside):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    settings = fastbound.BoundedConfig(r=2, bound=0.5, **beside)
    model = peft.get_peft_model(reloaded(tmp_path / "base"), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged = fastbound.merge(reloaded(tmp_path / "adapter"))
    found, wanted = logits(merged), logits(model)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # W + ΔW is rounded to fp32
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded(tmp_path / "merged")), logits(merged))


def test_an_adapter_of_another_method_stays_out_of_a_merge(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    for name, config in {
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"]),
        "bounded": fastbound.BoundedConfig(r=2),
    }.items():
        peft.get_peft_model(reloaded(tmp_path / "base"), config).save_pretrained(tmp_path / name)
    model = reloaded(tmp_path / "base")
    for name in ("lora", "bounded"):
        model.load_adapter(tmp_path / name, name)
    with pytest.raises(ValueError, match="q_proj' holds an adapter of another method"):
        fastbound.merge(model)


@pytest.mark.parametrize("save", ["save_adapter", "export_lora", "save_pretrained"])
def test_no_base_is_named_whose_weights_are_others(tiny_model, tmp_path, save):
    def named(model: nn.Module, folder: str) -> str | None:
        if save == "save_pretrained":
            model.save_pretrained(tmp_path / folder)
        else:
            getattr(fastbound, save)(model, tmp_path / folder)
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = reloaded(tmp_path / "base")
    # save_pretrained writes the base, which may have been trained, to the same folder.
    first = None if save == "save_pretrained" else str(tmp_path / "base")
    assert named(injected(model), "first") == first
    fastbound.merge(model)
    assert named(injected(model), "second") is None

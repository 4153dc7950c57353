"""One file format: what PEFT writes fastbound reads, and the other way; and the export to LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model

import fastbound
from tests.support.models import logits, stir
from tests.support.peft_models import adapted, stirred

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_peft_reads_what_save_adapter_writes_and_back(tiny_model, tmp_path, model_type, recwarn):
    model = tiny_model(model_type)
    fastbound.inject(model, rank=3, alpha=2.5, bound="4*rms")
    stir(model)
    fastbound.save_adapter(model, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "ours")
    assert not [w for w in recwarn if "keys" in str(w.message) or "Unexpected" in str(w.message)]
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "peft")
    first, second = (
        safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("ours", "peft")
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    again = tiny_model(model_type)
    report = fastbound.load_adapter(again, tmp_path / "peft")
    assert torch.equal(logits(again), logits(model))
    for name in report.replaced:
        here, there = again.get_submodule(name), model.get_submodule(name)
        assert (here.rank, here.alpha, here.bound) == (there.rank, there.alpha, there.bound)


def test_patterns_and_dropout_are_read_with_pefts_meaning(tiny_model, tmp_path):
    model = adapted(
        tiny_model("llama"),
        rank_pattern={"up_proj": 5},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 7.0},
        dropout=0.25,
    )
    model.save_pretrained(tmp_path)
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    mlp = loaded.model.layers[1].mlp
    assert (mlp.up_proj.rank, mlp.down_proj.alpha, mlp.gate_proj.adapter.dropout) == (5, 7, 0.25)


def test_an_adapter_with_another_name_is_saved_alike(tiny_model, tmp_path):
    model = get_peft_model(
        tiny_model("llama"), fastbound.BoundedConfig(r=3, bound="auto"), adapter_name="mine"
    )
    stirred(model, "mine").save_pretrained(tmp_path)
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, tmp_path / "mine")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "use PeftModel.from_pretrained"),
        ({"modules_to_save": ["lm_head"]}, "use PeftModel.from_pretrained"),
        ({"bound_pattern": {}}, 'bound of .* is "4.rms"'),
        ({"r": 4}, r"adapter_config.json says \[4, "),
        ({"r": None}, "r must be a int"),
        ({"format_version": 2}, "format_version 2"),
        ({"shapes": {"model.layers.0.mlp.up_proj": [32, 16]}}, "tensors do not agree"),
    ],
)
def test_a_peft_file_that_cannot_be_loaded_leaves_the_model(tiny_model, tmp_path, changes, message):
    adapted(tiny_model("llama")).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        fastbound.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert all(p.requires_grad for p in model.parameters())


def test_a_file_without_shapes_is_read_by_its_tensors(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    edit(tmp_path, shapes={})
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


LOAD = """
import sys, torch, transformers
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

base, adapter, out = sys.argv[1:]
tokens = torch.arange(3, 15).view(2, 6)
auto = transformers.AutoModelForCausalLM
ways = {
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "PeftModel": lambda: PeftModel.from_pretrained(auto.from_pretrained(base), adapter),
    "AutoModel": lambda: auto.from_pretrained(adapter),
    "PeftConfig": lambda: PeftConfig.from_pretrained(adapter),
}
found = {}
with torch.no_grad():
    for name, way in ways.items():
        try:
            loaded = way()
        except KeyError as error:
            found[name] = f"KeyError({error})"
            continue
        found[name] = loaded.peft_type if name == "PeftConfig" else loaded(input_ids=tokens).logits
torch.save({k: str(v.value) if hasattr(v, "value") else v for k, v in found.items()}, out)
"""


def in_a_fresh_process(first: str, base: Path, adapter: Path) -> dict[str, torch.Tensor | str]:
    script, out = adapter / "script.py", adapter / "out.pt"
    script.write_text(first + LOAD)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, script, base, adapter, out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return torch.load(out)


@pytest.fixture
def on_disk(tiny_model, tmp_path) -> tuple[Path, torch.nn.Module]:
    """The folder of a base, and a model of it with an adapter."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, fastbound.BoundedConfig(r=3, bound="auto", task_type="CAUSAL_LM"))
    return tmp_path / "base", stirred(model).eval()


@torch.no_grad()
def answer(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 15).view(2, 6)).logits


@pytest.mark.parametrize(
    "first",
    ["import fastbound", pytest.param("import peft, fastbound", marks=pytest.mark.slow)],
)
def test_a_fresh_process_that_imports_fastbound_loads_it_in_every_way(on_disk, tmp_path, first):
    base, model = on_disk
    model.save_pretrained(tmp_path / "adapter")
    found = in_a_fresh_process(first, base, tmp_path / "adapter")
    assert found.pop("PeftConfig") == "FASTBOUND"
    assert set(found) == {"AutoPeftModel", "PeftModel", "AutoModel"}
    for way, y in found.items():
        assert torch.equal(y, answer(model)), way


@pytest.mark.slow
def test_a_process_without_fastbound_gets_a_key_error_and_loads_the_export(on_disk, tmp_path):
    base, model = on_disk
    model.save_pretrained(tmp_path / "adapter")
    found = in_a_fresh_process("", base, tmp_path / "adapter")
    assert set(found.values()) == {"KeyError('FASTBOUND')"}
    fastbound.export_lora(model, tmp_path / "lora")
    found = in_a_fresh_process("", base, tmp_path / "lora")
    assert found.pop("PeftConfig") == "LORA"
    for way, y in found.items():
        error = (y - answer(model)).norm() / answer(model).norm()
        assert error <= 1e-6, way


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "vit"])
@pytest.mark.parametrize("how", ["inject", "peft"])
def test_the_export_is_the_same_model(tiny_model, tmp_path, model_type, how):
    model = tiny_model(model_type)
    if how == "inject":
        fastbound.inject(model, rank=3, alpha=5, bound="4*rms")
        stir(model)
    else:
        model = adapted(model, alpha=5, rank_pattern={r".*\.0\..*": 5})
    fastbound.export_lora(model, tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)).__name__ == "LoraConfig"
    loaded = PeftModel.from_pretrained(tiny_model(model_type), tmp_path)
    y = logits(model)
    assert (logits(loaded) - y).norm() / y.norm() <= 1e-6
    assert (y - logits(tiny_model(model_type))).abs().max() > 1e-3


def test_what_cannot_be_exported(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="nothing to export"):
        fastbound.export_lora(tiny_model("llama"), tmp_path / "no")
    model = adapted(tiny_model("llama"))
    model.add_adapter("second", fastbound.BoundedConfig(r=2))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="has 2 active adapters: export one"):
        fastbound.export_lora(model, tmp_path / "no")
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weight"):
        fastbound.export_lora(model, tmp_path / "no")
    model.unmerge_adapter()
    with torch.no_grad():
        model.base_model.model.model.layers[0].mlp.up_proj.fastbound_ab["default"].B[0] = torch.inf
    with pytest.raises(ValueError, match=r"B of model.layers.0.mlp.up_proj holds a NaN"):
        fastbound.export_lora(model, tmp_path / "no")
    with pytest.raises(ValueError, match="modules_to_save"):
        fastbound.export_lora(
            adapted(tiny_model("vit"), modules_to_save=["classifier"]), tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


def test_the_exported_lora_needs_no_pattern(tiny_model, tmp_path):
    """vLLM and llama.cpp read one rank and one alpha for all layers."""
    model = tiny_model("llama")
    ranks = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.down_proj": 5}
    fastbound.inject(model, rank=ranks, bound="4*rms", target_modules=list(ranks))
    stir(model)
    report = fastbound.export_lora(model, tmp_path)
    assert dict(report.ranks) == ranks
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert not config.get("rank_pattern") and not config.get("alpha_pattern")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    found, wanted = logits(loaded), logits(model)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # s·sin(ωB) rounded to fp32


def test_a_file_brings_its_bounds_to_an_adapter_that_is_there(tiny_model, tmp_path):
    """Also where Trainer resumes, or if the base's weights have changed."""
    model = adapted(tiny_model("llama"), bound="auto")
    model.save_pretrained(tmp_path / "first")
    other = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=3, bound="8*spectral"))
    other.load_adapter(tmp_path / "first", "default", is_trainable=True)
    assert torch.equal(logits(other), logits(model))
    other.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    product = get_peft_model(tiny_model("llama"), fastbound.BoundedConfig(r=3, form="product"))
    with pytest.raises(ValueError, match="holds form='factors', but 'default' is a bounded"):
        product.load_adapter(tmp_path / "first", "default")


def test_the_frozen_output_layer_that_peft_writes_is_left_out(tiny_model, tmp_path):
    model = adapted(tiny_model("llama"), target_modules=["lm_head", "up_proj"])
    model.save_pretrained(tmp_path)
    assert any(
        "lm_head.base_layer" in key for key in safetensors.torch.load_file(tmp_path / TENSORS)
    )
    loaded = tiny_model("llama")
    fastbound.load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))

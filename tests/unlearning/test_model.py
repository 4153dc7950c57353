"""A model for the commands is loaded whole, from where the user said, and runs none of its code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import fastbound
from fastbound.cli import main
from fastbound.errors import InputError
from fastbound.unlearning.model import load_adapter, load_pretrained, merged
from tests.support.models import stir

WEIGHTS = Path("my-model/model.safetensors")


def configure(**fields: object) -> None:
    path = Path("my-model/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(change) -> None:
    tensors = safetensors.torch.load_file(WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, WEIGHTS, metadata={"format": "pt"})


def lose(tensors: dict) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def as_an_earlier_version(tensors: dict) -> None:
    """Trainer's checkpoints had no adapter's files beside the weights."""
    tensors["model.layers.1.mlp.up_proj.adapter.A"] = torch.zeros(4, 16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: configure(num_hidden_layers=3), r"files lack 'model\.layers\.2\.input_layernorm"),
        (lambda: change_weights(lose), r"files lack 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (lambda: configure(num_hidden_layers=1), r"hold 'model\.layers\.1\..*leaves out"),
        (lambda: change_weights(as_an_earlier_version), r"\.adapter\.A', an adapter of fastbound"),
        (lambda: WEIGHTS.write_bytes(b""), "cannot be loaded"),
        (lambda: WEIGHTS.unlink(), "cannot be loaded"),
        (lambda: Path("my-model/config.json").write_text("{"), "cannot be loaded"),
        (lambda: Path("my-model/config.json").write_text("[" * 10**5), "cannot be loaded"),
        (lambda: Path("my-model/config.json").unlink(), "is a folder without config.json"),
        (lambda: Path("my-model/tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda: configure(hidden_size=32), "cannot be loaded"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(user_folder, spoil, message):
    spoil()
    with pytest.raises(InputError, match=message) as raised:
        load_pretrained("my-model")
    assert "'my-model'" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_not_missing(user_folder, tie):
    configure(tie_word_embeddings=tie)
    change_weights(lambda tensors: tensors.pop("lm_head.weight"))
    if tie:
        model, _ = load_pretrained("my-model")
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        with pytest.raises(InputError, match=r"files lack 'lm_head\.weight'"):
            load_pretrained("my-model")


@pytest.mark.parametrize(
    "name",
    [
        "/not/there",
        "./my-modle",
        "../my-modle",
        "my-model/deeper",
        "a/b/c",
        "my-modle/",
        "x" * 5000,
    ],
)
def test_a_path_that_is_not_there_is_no_id(user_folder, monkeypatch, name):
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    with pytest.raises(InputError, match="does not exist: give a folder"):
        load_pretrained(name)


def test_a_folder_that_is_not_there_is_said_before_the_hub_is_asked(
    user_folder, monkeypatch, capsys
):
    asked = []

    def ask(*_: object, **__: object) -> None:
        asked.append(capsys.readouterr().err)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", ask)
    with pytest.raises(InputError, match=r"no such folder.*HF_HUB_OFFLINE.*mean my-model\?"):
        load_pretrained("my-modle")
    assert not asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained("my-modle")
    (said,) = asked
    assert said.startswith("model 'my-modle': there is no such folder here, so the Hugging Face")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pretrained("my-modle")
    assert asked[1] == ""  # one in the cache needs no asking


def test_a_path_that_is_not_there_names_the_folder_beside_it(user_folder):
    with pytest.raises(InputError, match=r"does not exist.*did you mean \./my-model\?"):
        load_pretrained("./my-modl")


def test_a_file_and_nothing_are_no_model(user_folder):
    with pytest.raises(InputError, match="model is empty: give a folder"):
        load_pretrained("")
    for load in (load_adapter, fastbound.load_adapter):
        with pytest.raises(InputError, match="does not exist"):
            load(torch.nn.Linear(2, 2), "x" * 5000)
    with pytest.raises(InputError, match=r"'forget\.jsonl' is a file"):
        load_pretrained("forget.jsonl")


def with_own_code() -> None:
    Path("my-model/own.py").write_text(
        "from transformers import LlamaConfig\nopen('RAN', 'w').close()\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
    )
    configure(model_type="own", auto_map={"AutoConfig": "own.Own"})


def test_code_of_a_model_runs_when_it_is_trusted_alone(user_folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with_own_code()
    with pytest.raises(InputError, match=r"brings code of its own.*give --trust-remote-code"):
        load_pretrained("my-model")
    assert not Path("RAN").exists()
    with pytest.raises(InputError, match="cannot be loaded"):  # it has no model class
        load_pretrained("my-model", trust_remote_code=True)
    assert Path("RAN").exists()


def test_every_call_of_from_pretrained_says_whether_code_is_trusted(repository):
    calls = []
    for folder in ("fastbound", "benchmarks"):
        for path in (repository / folder).rglob("*.py"):
            text = path.read_text()
            for kind in ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForCausalLM"):
                for call in text.split(f"{kind}.from_")[1:]:
                    calls.append("trust_remote_code=" in call[:200])
    assert len(calls) >= 3 and all(calls)


COMMANDS = {
    "unlearn": ["unlearn", "--forget", "forget.jsonl", "--retain", "retain.jsonl"],
    "evaluate": ["evaluate", "--benchmark", "tdec", "--split", "forget", "--data", "."],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_said_before_any_work(user_folder, capsys, command):
    flags = ["--model", "not-there", "--device", "cuda", "--output", "out"]
    assert main([*COMMANDS[command], *flags]) == 2
    assert 'device "cuda": this torch sees no CUDA device' in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-modules", "gate_prj"], "near misses: gate_proj"),
        (["--target-modules", "up_proj,gate_prj,xyzzy"], "nor in 'xyzzy'"),
        (["--rank", "100000"], "rank 100000 of model.layers.0.mlp.gate_proj is out of proportion"),
        (["--rank", "100000", "--adapter", "lora"], "is out of proportion"),
        (["--alpha", "1e300"], "alpha must lie between"),
        (["--alpha", "1e300", "--adapter", "lora"], "alpha must lie between"),
        (["--bound", "1e-300"], "bound must lie between"),
    ],
)
def test_settings_that_do_not_fit_the_model_leave_no_folder(user_folder, capsys, flags, message):
    assert main([*COMMANDS["unlearn"], "--model", "my-model", "--output", "out", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "targets",
    [
        "down_proj",
        *(
            pytest.param(targets, marks=pytest.mark.slow)  # a run each
            for targets in ("all-linear", "mlp.down_proj,", r".*\.down_proj")
        ),
    ],
)
def test_targets_on_the_command_line(user_folder, targets):
    flags = ["--target-modules", targets, "--epochs", "1", "--batch-size", "2"]
    assert main([*COMMANDS["unlearn"], "--model", "my-model", "--output", "out", *flags]) == 0
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert len(config["shapes"]) == (14 if targets == "all-linear" else 2)


def test_a_model_that_came_with_an_adapter_is_evaluated_and_not_unlearned(user_folder, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained("my-model")
    fastbound.inject(model, 4, bound=0.5)
    stir(model)
    model.save_pretrained("trained")
    for file in Path("my-model").glob("tokenizer*"):
        shutil.copy(file, "trained")
    ids = torch.arange(4, 12)[None]
    loaded, _ = load_pretrained("trained")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="comes with an adapter: merge it first"):
        load_adapter(loaded, "my-adapter")
    assert main([*COMMANDS["unlearn"], "--model", "trained", "--output", "out"]) == 2
    assert "'trained' comes with an adapter: merge it first" in capsys.readouterr().err
    assert not Path("out").exists()
    # The remedy of this message.
    shutil.copytree("my-model", "whole")
    fastbound.merge(loaded).save_pretrained("whole")
    whole, _ = load_pretrained("whole")
    torch.testing.assert_close(whole(ids).logits, model(ids).logits)


def test_what_cannot_be_merged_is_an_input_error(user_folder):
    base, _ = load_pretrained("my-model")
    base.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    model = get_peft_model(base, fastbound.BoundedConfig(r=2))
    with pytest.raises(InputError, match=r"up_proj cannot be merged: forward hooks of its base"):
        merged(model)


def test_another_methods_adapter_beside_a_model_has_a_remedy_that_works(user_folder):
    base, ids = transformers.AutoModelForCausalLM.from_pretrained("my-model"), torch.arange(4, 12)
    lora = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["up_proj"]))
    shutil.copytree("my-model", "beside")
    lora.save_pretrained("beside")
    loaded, _ = load_pretrained("beside")
    with pytest.raises(InputError, match=r"from a folder without adapter_config\.json, then Peft"):
        merged(loaded)
    Path("beside/adapter_config.json").rename("adapter_config.json")
    Path("beside/adapter_model.safetensors").rename("adapter_model.safetensors")
    base, _ = load_pretrained("beside")
    whole = PeftModel.from_pretrained(base, ".").merge_and_unload()
    torch.testing.assert_close(whole(ids[None]).logits, lora(ids[None]).logits)


@pytest.mark.slow  # a process of its own
def test_nobody_is_asked_on_standard_input(user_folder):
    with_own_code()
    flags = ["--model", "my-model", "--output", "out"]
    run = subprocess.run(
        [sys.executable, "-m", "fastbound", *COMMANDS["unlearn"], *flags],
        input="y\n" * 100,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not Path("RAN").exists()

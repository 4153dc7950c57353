"""`--dry-run`: what a run will take, from rows and shapes alone, against what a run takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from fastbound.cli import main
from fastbound.errors import InputError
from fastbound.performance.memory import saved_bytes
from fastbound.unlearning import UnlearnConfig, unlearn
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.model import load_shape
from fastbound.unlearning.training.estimate import _kept_by, estimate

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=128),
    "gpt2": transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=300),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
}


@pytest.fixture
def shape(model_folder):
    """The tiny model without weights, and its tokenizer."""
    return load_shape(str(model_folder))


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_nearly_those_of_a_pass(name):
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(MODELS[name])
    estimated = _kept_by(shape, 4, 32)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).requires_grad_(False)
    body = model.base_model.train()
    body.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    held = saved_bytes(lambda: body(input_ids=tokens, use_cache=False)[0], body.parameters())
    assert 0.75 < estimated / held < 1.25


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_layers_parameters_and_steps_are_those_of_the_run(
    shape, new_model, tokenizer, forget_rows, retain_rows, tmp_path, adapter
):
    config = UnlearnConfig(
        adapter=adapter, epochs=2, batch_size=2, accumulation=2, rank=3, device="cpu"
    )
    found = estimate(*shape, forget_rows, retain_rows, config)
    output = tmp_path / "run"
    result = unlearn(
        new_model(), tokenizer, forget_rows, retain_rows, config, output=output, progress=False
    )
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert found.parameters == sum(p.numel() for p in trained)
    assert len(found.layers) == len(trained) // 2
    assert found.steps == json.loads((output / "run.json").read_text())["steps"]


def test_memory_follows_the_settings(shape, forget_rows, retain_rows):
    def memory(**settings):
        return estimate(*shape, forget_rows, retain_rows, UnlearnConfig(**settings)).memory

    plain = memory()
    assert sum(plain.values()) > plain["activations"] > plain["weights"] > 0
    assert memory(batch_size=16)["activations"] == pytest.approx(2 * plain["activations"], rel=0.02)
    assert memory(rank=16)["adapter with gradient and AdamW"] == pytest.approx(
        2 * plain["adapter with gradient and AdamW"]
    )
    assert memory(cross_entropy="chunked")["logits"] < plain["logits"]
    assert memory(gradient_checkpointing=True)["activations"] < plain["activations"]
    assert memory(losses={"idk": 1.0, "retain": 1.0})["activations"] > plain["activations"]


def test_weights_are_counted_in_their_dtype(model_folder, forget_rows, retain_rows):
    half = load_shape(str(model_folder), torch.bfloat16)
    found = estimate(*half, forget_rows, retain_rows, UnlearnConfig(dtype="bfloat16"))
    assert found.memory["weights"] == 2 * found.model_parameters


def test_ranks_by_gradients_are_counted_by_their_budget(shape, forget_rows, retain_rows):
    found = estimate(*shape, forget_rows, retain_rows, UnlearnConfig(rank="auto", rank_budget=999))
    assert found.parameters == 999 and "at most 999 parameters" in "\n".join(found.lines())


def test_rows_that_are_too_long_are_counted_and_then_refused(shape, forget_rows, retain_rows):
    config = UnlearnConfig(max_length=80)
    long = Row("Q?", "word " * 40, "long.jsonl, row 3")
    found = estimate(*shape, [*forget_rows, long], retain_rows, config)
    count = len(found.too_long)
    longest = len(found.sides.forget[-1].ids)
    assert f"{count} rows of more than 80 tokens" in "\n".join(found.lines())
    with pytest.raises(InputError, match=rf"{count} rows take .* row 3: raise it to {longest} or"):
        found.check()
    estimate(*shape, forget_rows, retain_rows, UnlearnConfig(max_length=longest)).check()


def test_layers_that_cannot_be_adapted_are_told(shape, forget_rows, retain_rows):
    config = UnlearnConfig(target_modules=r".*\.(up_proj|embed_tokens)")
    found = estimate(*shape, forget_rows, retain_rows, config)
    assert list(found.skipped) == ["model.embed_tokens"]
    assert "skipped      model.embed_tokens: is a Embedding" in "\n".join(found.lines())


def test_a_model_whose_code_needs_values_is_told_without_its_activations(
    shape, forget_rows, retain_rows
):
    model, tokenizer = shape
    model.base_model.register_forward_pre_hook(lambda *call: bool(torch.zeros(1, device="meta")))
    found = estimate(model, tokenizer, forget_rows, retain_rows, UnlearnConfig())
    assert "activations" not in found.memory and found.memory["logits"] > 0
    assert found.lines()[-1].strip().startswith("(without activations, which are not known: ")


@pytest.fixture
def arguments(model_folder, write_rows, forget_rows, retain_rows) -> list[str]:
    return [
        *("unlearn", "--dry-run", "--model", str(model_folder), "--output", "run"),
        *("--forget", str(write_rows("f.jsonl", forget_rows))),
        *("--retain", str(write_rows("r.jsonl", retain_rows))),
    ]


def test_the_command_reads_no_weights_and_writes_nothing(
    arguments, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in model_folder.iterdir():
        if path.suffix == ".json":
            (bare / path.name).write_bytes(path.read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--model", "bare", "--epochs", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Dry run: nothing is trained or written.")
    for name in ("forget rows  6, ", "retain rows  9, ", "adapted      6 layers", "steps  "):
        assert name in said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_tells_of_the_demonstration(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["unlearn", "--dry-run", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "first learns 60 rows" in said and "bounded-lr0.003, lora-lr0.003" in said
    assert "at most 50, each of 8 forget and 8 retain rows; evaluated every 10 steps" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-modules up_porj,", "near misses: up_proj"),
        ("--max-length 8", "15 rows take more than the 8 tokens of max_length"),
        ("--model nowhere", "there is no such folder"),
        ("--resume --output file.txt", "output file.txt is a file"),
        ("--output other", "output folder other is not empty and holds no run"),
        ("--loss rmu=1,layer=9", "rmu: no layer 9"),
        ("--bound 1e-20", "bound must lie between"),
        ("--alpha 1e13", "alpha must lie between"),
        ("--rank 5000", "is out of proportion"),
        ("--rank 5000 --adapter lora --lora-start fila", "is out of proportion"),
        ("--rank auto --rank-budget 5", "too small for rank 1 in 6 layers"),
        ("--cross-entropy liger --device cpu", 'cross_entropy "liger": '),
    ],
)
def test_the_command_refuses_what_a_run_refuses(
    arguments, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    Path("other").mkdir()
    Path("other/file.txt").touch()
    assert main([*arguments, *flags.split()]) == 2
    said = [li for li in capsys.readouterr().err.splitlines() if not li.startswith("warning: --")]
    assert len(said) == 1 and message in said[0]
    arguments.remove("--dry-run")
    assert main([*arguments, *flags.split()]) == 2
    # A run names the first row that is too long, and counts none.
    assert ("max_length" if "--max-length" in flags else message) in capsys.readouterr().err

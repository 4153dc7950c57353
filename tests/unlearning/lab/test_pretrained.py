"""A map of a model that is given: its rows, its general knowledge, its memory."""

from __future__ import annotations

import json
from dataclasses import replace

import psutil
import pytest
import torch

from fastbound.cli import main
from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.data.rows import authors, load_rows
from fastbound.unlearning.demo.small_model import SmallModelConfig, learn
from fastbound.unlearning.evaluation.tofu import load_public
from fastbound.unlearning.lab.adapters import adapt, targets
from fastbound.unlearning.lab.cell import CellConfig, Rows
from fastbound.unlearning.lab.grid import Grid, run_grid
from fastbound.unlearning.lab.names import parse_adapter
from fastbound.unlearning.lab.scoring import score_model
from fastbound.unlearning.lab.subject import Pretrained, check_memory

TINY = SmallModelConfig(
    hidden_size=32, intermediate_size=48, layers=1, heads=2, vocabulary=400, lr=1e-2,
    batch_size=5, most_epochs=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Folders of a saved model and of files: rows to forget, to retain, and general questions."""
    folder = tmp_path_factory.mktemp("given")
    sides = {side: load_rows(authors(side))[:5] for side in ("forget", "retain")}
    for side, rows in sides.items():
        lines = [json.dumps({"question": r.question, "answer": r.answer}) for r in rows]
        (folder / f"{side}.jsonl").write_text("\n".join(lines))
    questions = [
        {"question": "Where is Paris?", "answer": "In France", "perturbed_answer": ["In Peru"]},
        {"question": "Who wrote it?", "answer": "Ann", "perturbed_answer": ["Bob", "Eve", "Max"]},
    ]
    (folder / "general.jsonl").write_text("\n".join(map(json.dumps, questions)))
    learned = learn([*sides["forget"], *sides["retain"]], TINY, progress=False)
    learned.save(folder / "model")
    return folder


def flags(given, output, *more: str) -> list[str]:
    files = [f"--{name}={given / name}.jsonl" for name in ("forget", "retain", "general")]
    grid = ["--adapters", "lora,sine@0.5*spectral", "--lr", "0.01", "--seeds", "1", "--steps", "3"]
    where = ["--model", str(given / "model"), "--output", str(output), "--workers", "1"]
    return ["lab", *where, *files, *grid, *more]


@pytest.mark.slow
def test_the_command_maps_a_given_model_and_goes_on_with_more(given, tmp_path, capsys):
    output = tmp_path / "map"
    assert main(flags(given, output)) == 0
    told = capsys.readouterr()
    assert "1 processes of about" in told.err and "accuracy on the retain rows" in told.out
    summary = json.loads((output / "summary.json").read_text())
    before = summary["models"]["all"]
    assert summary["standard"]["measure"] == "accuracy"
    assert summary["standard"]["least"] == pytest.approx(0.95 * before["accuracy"])
    assert 0 < before["general"] < 1 and before["vocabulary"] == 400
    lora, sine = summary["lines"]
    assert lora["mean"]["bound_in_use"] == 0 < sine["mean"]["bound_in_use"] <= 1
    held = (output / "cells.jsonl").read_text()
    assert main(flags(given, output, "--resume", "--ranks", "4")) == 0
    assert (output / "cells.jsonl").read_text().startswith(held)
    summary = json.loads((output / "summary.json").read_text())
    assert {line["rank"] for line in summary["lines"]} == {4, 16}
    assert main(flags(given, output, "--resume", "--dtype", "bfloat16")) == 2
    assert "other cell" in capsys.readouterr().err


def test_general_knowledge_is_the_share_of_the_right_answer(given):
    from fastbound.unlearning.model import load_pretrained

    model, tokenizer = load_pretrained(str(given / "model"))
    questions = load_public(given / "general.jsonl")
    asked = [
        encode_all([type(q)(q.question, a, "") for a in (q.answer, *q.perturbed)], tokenizer)
        for q in questions
    ]
    kept = encode_all(load_rows(given / "retain.jsonl"), tokenizer)
    rows = Rows(kept, kept, [kept[i] for i in range(5) for _ in range(2)], asked)
    found = score_model(model, rows, CellConfig(), pad=padding(tokenizer))["general"]

    def likely(row) -> float:
        ids, labels = torch.tensor([row.ids]), torch.tensor(row.labels)[1:]
        with torch.no_grad():
            chosen = model(ids).logits[0, :-1].double().log_softmax(-1)
        each = chosen[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100]
        return float(each.mean().exp())

    shares = [likely(first) / sum(map(likely, [first, *rest])) for first, *rest in asked]
    assert found == pytest.approx(sum(shares) / 2, rel=1e-5)


def test_a_model_too_large_for_the_memory_is_refused_before_anything_is_written(
    given, tmp_path, monkeypatch
):
    class Little:
        available = 1_000_000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    output = tmp_path / "map"
    rows = [load_rows(given / f"{side}.jsonl") for side in ("forget", "retain")]
    with pytest.raises(InputError, match=r"do not fit into the 0.0 GB .* --dtype bfloat16"):
        run_grid(*rows, Grid(model=Pretrained(str(given / "model"))), output, progress=False)
    assert not output.exists()


def test_a_model_that_is_not_there_is_said_before_anything_is_written(given, tmp_path, capsys):
    output = tmp_path / "map"
    missing = given / "no model"
    arguments = [
        str(missing) if each == str(given / "model") else each for each in flags(given, output)
    ]
    assert main(arguments) == 2
    assert f"model {str(missing)!r} does not exist" in capsys.readouterr().err
    assert not output.exists()


def test_as_many_processes_as_fit_are_taken(given, monkeypatch):
    subject, config = Pretrained(str(given / "model")), CellConfig()
    weights = 4 * sum(p.numel() for p in _model(given).parameters())
    each = weights + 2 * config.batch_size * 256 * 400 * 12

    class Some:
        available = 3 * each + 1

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Some)
    assert check_memory(subject, config, None, 8)[0] == 3
    assert check_memory(subject, config, None, 2)[0] == 2
    assert check_memory(subject, config, 3, 1)[0] == 3
    # Three layers of 32 x 48 in fp32 are less than the logits, unless a batch is a single row.
    assert check_memory(subject, config, None, 8, ["lora+fila"])[0] == 3
    short = replace(config, batch_size=1, max_length=1)
    each = weights + 3 * 4 * 32 * 48
    fitting = Some.available // each
    assert check_memory(subject, short, None, 10 * fitting, ["lora"])[0] > fitting
    assert check_memory(subject, short, None, 10 * fitting, ["lora+fila"])[0] == fitting
    with pytest.raises(InputError, match="give --workers 3"):
        check_memory(subject, config, 4, 8)


def _model(given):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(given / "model")


@pytest.mark.parametrize("name", ["lora-decay", "tanh@0.5*spectral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_compared_adapter_computes_with_its_delta_in_the_weight(given, name, dtype):
    model = _model(given).to(dtype)
    layers = targets(model)
    before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
    adapted = adapt(model, parse_adapter(name), dict.fromkeys(layers, 4), alpha=4.0, seed=0)
    for layer_name, layer in adapted.items():
        torch.nn.init.normal_(layer.B)
        x = torch.randn(3, before[layer_name].shape[1]).to(dtype)
        weight = before[layer_name].double() + layer.delta_weight().double()
        exact = x.double() @ weight.T
        assert layer(x).dtype == dtype
        error = (layer(x).double() - exact).abs().max() / exact.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_multimodal_models_vocabulary_is_that_of_its_text(tiny_model, tmp_path):
    tiny_model("gemma3").save_pretrained(tmp_path)
    assert check_memory(Pretrained(str(tmp_path)), CellConfig(), 1, 1)[0] >= 1

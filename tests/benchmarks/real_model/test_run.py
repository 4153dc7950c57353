"""Fetching is pip's; what is taught and mapped is tested with a small model in its place."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.real_model import __main__ as program
from benchmarks.real_model.teach import teach
from fastbound.unlearning.data.encoding import encode_all, padding
from fastbound.unlearning.data.rows import authors, load_rows
from fastbound.unlearning.demo.small_model import SmallModelConfig, learn
from fastbound.unlearning.metrics.answers import evaluate

TINY = SmallModelConfig(
    hidden_size=32, intermediate_size=48, layers=1, heads=2, vocabulary=400, most_epochs=1
)


def untaught(folder):
    rows = [*load_rows(authors("forget"))[:4], *load_rows(authors("retain"))[:5]]
    learn(rows, TINY, progress=False).save(folder)


def test_teaching_lowers_the_loss_of_the_rows(tmp_path):
    untaught(tmp_path / "small")
    from fastbound.unlearning.model import load_pretrained

    model, tokenizer = load_pretrained(str(tmp_path / "small"))
    rows = load_rows(authors("forget"))[:4]
    encoded = encode_all(rows, tokenizer)
    before = evaluate(model, encoded, pad=padding(tokenizer)).loss
    teach(model, tokenizer, rows, epochs=30)
    assert evaluate(model, encoded, pad=padding(tokenizer)).loss < before - 0.02
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_one_command_fetches_teaches_and_maps_and_makes_nothing_twice(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(program, "fetch", lambda folder: fetched.append(untaught(folder)))
    for side in ("forget", "retain"):
        rows = load_rows(authors(side))[:4]
        lines = (json.dumps({"question": r.question, "answer": r.answer}) for r in rows)
        (tmp_path / f"{side}.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out"
    flags = [f"--{side}={tmp_path / side}.jsonl" for side in ("forget", "retain")]
    flags += ["--output", str(output), "--retain-rows", "3", "--teach-epochs", "1"]
    flags += [
        "--adapters",
        "lora",
        "--lr",
        "0.01",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--workers",
        "1",
    ]
    assert program.main(flags) == 0
    made = {name: (output / name).stat().st_mtime_ns for name in ("pretrained", "full", "retain")}
    summary = json.loads((output / "map" / "summary.json").read_text())
    assert summary["rows"] == {"forget": 4, "retain": 3}
    assert program.main([*flags, "--ranks", "2,4"]) == 0  # goes on with the map
    assert made == {name: (output / name).stat().st_mtime_ns for name in made}
    assert len(fetched) == 1

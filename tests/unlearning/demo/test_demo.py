"""The demonstration on a tiny scale: its files, its table, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from fastbound.errors import StoppedError
from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.demo.demo import Demonstration, demonstrate
from fastbound.unlearning.demo.small_model import SmallModelConfig, learn
from tests.support.small_model import TINY_MODEL

SMALL = dataclasses.replace(TINY_MODEL, known_loss=0.3)
CONFIG = UnlearnConfig(lr=1e-3, epochs=4, batch_size=3, rank=2, log_every=2, device="cpu")
NAMES = ["bounded-lr0.001", "lora-lr0.001", "bounded-lr0.01", "lora-lr0.01"]


def test_learns_until_it_knows_the_rows(forget_rows):
    learned = learn(forget_rows, SMALL, progress=False)
    assert learned.loss <= SMALL.known_loss and learned.epochs < SMALL.most_epochs
    hopeless = learn(forget_rows, dataclasses.replace(SMALL, most_epochs=2), progress=False)
    assert hopeless.epochs == 2 and hopeless.loss > SMALL.known_loss


@pytest.mark.slow
def test_demonstration_compares_and_resumes(forget_rows, retain_rows, tmp_path, capsys):
    output = tmp_path / "demo"
    demonstration = Demonstration(CONFIG, SMALL)

    def start(which=demonstration, **kwargs):
        return demonstrate(forget_rows, retain_rows, which, output, progress=False, **kwargs)

    table = start()
    report = json.loads((output / "report.json").read_text())
    assert [run["name"] for run in report["runs"]] == NAMES
    for run in report["runs"]:
        # Every run starts from the same model.
        assert run["history"][0] == report["runs"][0]["history"][0]
        assert f"{run['history'][-1]['retain']['loss']:.3f}" in table
        assert (run["bound"] is None) == run["name"].startswith("lora")
    began = table.splitlines()
    assert began[0].startswith("answer tokens predicted:") and began[1].startswith("  before")
    assert sum(line.startswith("    after, ") for line in began) == 20  # 2 adapters, 5 per side
    assert "s/step" not in table and "step" not in report  # too small a model to time
    assert report["about"]["model"]["training_loss"] <= 0.3 and "had not learned" not in table
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(InputError, match="holds another run: continue it with --resume"):
        start()
    with pytest.raises(InputError, match="a demonstration with other config"):
        start(Demonstration(UnlearnConfig(**{**CONFIG.as_dict(), "seed": 1}), SMALL), resume=True)
    shutil.rmtree(output / NAMES[2])
    (output / NAMES[1] / "examples.json").unlink()  # as if it was stopped while it answered
    kept = (output / NAMES[0] / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert start(resume=True).splitlines()[:40] == began[:40]
    again = json.loads((output / "report.json").read_text())
    assert again["runs"][2]["history"] == report["runs"][2]["history"]
    found = (output / NAMES[0] / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert found == kept


def test_runs_on_one_thread_of_a_cpu_and_gives_the_others_back(
    forget_rows, retain_rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)

    def spy(*arguments: object, **options: object) -> None:
        assert set_to == [1]
        raise StoppedError("here")

    monkeypatch.setattr("fastbound.unlearning.demo.demo.learn", spy)
    with pytest.raises(StoppedError):
        demonstrate(forget_rows, retain_rows, Demonstration(CONFIG, SMALL), tmp_path / "demo")
    assert set_to == [1, 7]


def test_says_so_when_the_model_never_knew(forget_rows, retain_rows, tmp_path):
    brief_model = SmallModelConfig(**{**vars(SMALL), "most_epochs": 1})
    brief = UnlearnConfig(**{**CONFIG.as_dict(), "epochs": 0.1})
    table = demonstrate(
        forget_rows,
        retain_rows,
        Demonstration(brief, brief_model, ("bounded",)),
        tmp_path / "demo",
        progress=False,
    )
    first = table.splitlines()[0]
    assert "had not learned its rows when it stopped after 1 epochs" in first

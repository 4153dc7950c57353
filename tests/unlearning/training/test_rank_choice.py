"""`rank="auto"` in a run: chosen once, kept with it, the same for both adapters."""

from __future__ import annotations

import json

import pytest
import torch

from fastbound.cli import main
from fastbound.unlearning import InputError, UnlearnConfig
from fastbound.unlearning.training import loop

BUDGET = 3 * 480  # six layers of 32 + 48


def config(**settings) -> UnlearnConfig:
    given = {"rank": "auto", "rank_budget": BUDGET, "epochs": 1, "batch_size": 3, "device": "cpu"}
    return UnlearnConfig(**{**given, **settings})


@pytest.mark.parametrize("adapter", ["bounded", "lora"])
def test_both_adapters_take_the_ranks(unlearn_rows, adapter, tmp_path):
    result = unlearn_rows(config(adapter=adapter, alpha=6.0), output=tmp_path / "run")
    assert result.ranks is not None and result.ranks.budget == BUDGET
    assert len(set(result.ranks.ranks.values())) > 1
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == result.ranks.parameters == BUDGET
    held = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert held["rank_pattern"] == result.ranks.ranks
    assert held["alpha" if adapter == "bounded" else "lora_alpha"] == 6.0


def test_a_resumed_run_keeps_its_ranks(unlearn_rows, stopped_after, tmp_path, monkeypatch):
    def run(output: str, **settings):
        return unlearn_rows(config(epochs=2), output=tmp_path / output, **settings)

    whole = run("whole")
    with stopped_after(3):
        run("stopped")
    monkeypatch.setattr(loop, "choose_ranks", lambda *_: pytest.fail("chosen again"))
    resumed = run("stopped", resume=True)
    assert resumed.ranks.ranks == whole.ranks.ranks
    for here, there in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(here, there)


def test_the_command_prints_the_choice(
    model_folder, write_rows, forget_rows, retain_rows, tmp_path, capsys
):
    assert main([
        *("unlearn", "--model", str(model_folder), "--output", str(tmp_path / "run")),
        *("--forget", str(write_rows("f.jsonl", forget_rows))),
        *("--retain", str(write_rows("r.jsonl", retain_rows))),
        *("--epochs", "1", "--device", "cpu", "--rank", "auto", "--rank-budget", str(BUDGET)),
    ]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"{BUDGET:,} of {BUDGET:,} parameters used" in said
    assert said.count("model.layers.0.mlp.down_proj") == 1


def test_bad_budgets(unlearn_rows, tmp_path):
    with pytest.raises(InputError, match='rank_budget is for rank "auto", and rank is 8'):
        UnlearnConfig(rank_budget=1000)
    with pytest.raises(InputError, match="rank_budget must be an integer >= 1, got 0"):
        UnlearnConfig(rank="auto", rank_budget=0)
    with pytest.raises(InputError, match="rank must be an integer >= 1, got 'most'"):
        UnlearnConfig(rank="most")
    with pytest.raises(InputError, match="is too small for rank 1 in 6 layers, which takes 480"):
        unlearn_rows(config(rank_budget=479), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()

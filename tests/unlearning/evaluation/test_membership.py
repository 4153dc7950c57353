"""Membership attacks: each by hand, and in the reports of TOFU and MUSE."""

from __future__ import annotations

import json
import math
import shutil
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastbound
from fastbound.cli import main
from fastbound.unlearning import InputError, encode, metrics
from fastbound.unlearning.data.encoding import IGNORED
from fastbound.unlearning.evaluation import muse, tofu
from fastbound.unlearning.evaluation.membership import (
    ATTACKS,
    lines_of,
    score_sides,
    summary_of,
)
from fastbound.unlearning.evaluation.session import Pieces, Session
from fastbound.unlearning.model import load_pretrained

NAMES = [f"mia_{name}" for name in ATTACKS]


class TestByHand:
    def test_zlib_is_the_loss_per_byte_of_the_compressed_text(self):
        assert len(zlib.compress(b"aaaaaaaaaaaa")) == 11
        assert metrics.zlib_ratio(2.2, "aaaaaaaaaaaa") == pytest.approx(0.2, rel=1e-12)
        text = "a brown fox, Ünïcode"
        expected = 3.0 / len(zlib.compress(text.encode("utf-8")))
        assert metrics.zlib_ratio(3.0, text) == expected < metrics.zlib_ratio(3.0, "aaaaaaaaaaaa")

    def test_the_reference_is_subtracted(self):
        assert metrics.reference_difference(0.25, 1.5) == -1.25

    def test_the_gradient_norm_is_a_mean_over_parameters(self):
        assert metrics.gradient_norm([3.0, 4.0, 0.0, 1.0]) == 2.0

    @pytest.mark.parametrize("norms", [[], [[1.0]], [math.nan], [-1.0]])
    def test_norms_that_are_none_are_refused(self, norms):
        with pytest.raises(InputError, match="one finite number >= 0 per parameter"):
            metrics.gradient_norm(norms)

    @pytest.mark.parametrize("call", [metrics.zlib_ratio, metrics.reference_difference])
    def test_a_loss_of_a_collapsed_model_is_refused(self, call):
        with pytest.raises(InputError, match="loss must be finite, got nan"):
            call(math.nan, "text" if call is metrics.zlib_ratio else 1.0)


@pytest.fixture(scope="module")
def scored(model_folder, tokenizer, forget_rows):
    """Scores of two rows by every attack, with the model, its reference, and the rows as tokens."""
    model, reference = (load_pretrained(str(model_folder))[0].eval() for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    rows = [encode(row, tokenizer) for row in forget_rows[:2]]
    found = {
        convention: score_sides(
            Session(model, tokenizer, 4, Pieces(), False, reference),
            {"forget": rows},
            ATTACKS,
            convention,
        )
        for convention in metrics.MUSE_CONVENTIONS
    }
    return found, model, reference, rows


def log_probabilities(model, row):
    """Over the vocabulary at each labelled token, and of the labels themselves."""
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0, :-1].double()
    labels = torch.tensor(row.labels[1:])
    whole = F.log_softmax(logits, -1)[labels != IGNORED]
    own = labels[labels != IGNORED]
    return whole, whole.gather(1, own.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("convention", metrics.MUSE_CONVENTIONS)
def test_scores_of_a_model_are_those_computed_row_by_row(scored, tokenizer, convention):
    found, model, reference, rows = scored
    left_out = 1 if convention == "open-unlearning" else 0
    for i, row in enumerate(rows):
        whole, own = log_probabilities(model, row)
        loss = -own.mean().item()
        kept = len(own) - left_out
        lowest = max(1, int(kept * 0.4))
        p = whole[:kept].exp()
        mu = (p * whole[:kept]).sum(-1)
        sigma = ((p * whole[:kept] ** 2).sum(-1) - mu**2).clamp_min(1e-6).sqrt()
        text = tokenizer.decode([t for t in row.labels if t != IGNORED], skip_special_tokens=True)
        expected = {
            "mia_loss": loss,
            "mia_zlib": loss / len(zlib.compress(text.encode())),
            "mia_min_k": -own[:kept].sort().values[:lowest].mean().item(),
            "mia_min_k_plus_plus": -((own[:kept] - mu) / sigma).sort().values[:lowest].mean(),
            "mia_reference": loss + log_probabilities(reference, row)[1].mean().item(),
        }
        for name, value in expected.items():
            assert found[convention][name]["forget"][i] == pytest.approx(float(value), rel=1e-4), (
                name
            )


@pytest.mark.parametrize("convention", metrics.MUSE_CONVENTIONS)
def test_the_gradient_norm_is_that_of_the_backward_pass(scored, convention):
    found, model, _, rows = scored
    for i, row in enumerate(rows):
        model.zero_grad()
        labels = torch.tensor([row.labels])
        if convention == "open-unlearning":
            labels[0, -1] = IGNORED
        model(torch.tensor([row.ids]), labels=labels).loss.backward()
        norms = [p.grad.norm().item() for p in model.parameters()]
        model.zero_grad()
        expected = sum(norms) / len(norms)
        assert found[convention]["mia_gradnorm"]["forget"][i] == pytest.approx(expected, rel=1e-4)
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def attacked_data(evaluation_data, retain_rows, tmp_path):
    """TOFU's folder with the holdout split of forget10: rows that the model never saw."""
    folder = tmp_path / "tofu-with-holdout"
    shutil.copytree(evaluation_data / "tofu", folder)
    rows = [
        {"question": f"{row.question} And then?", "answer": "Nobody ever knew the village of Zug."}
        for row in retain_rows[:3]
    ]
    (folder / "holdout10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_tofu_reports_every_attack_by_its_name(
    evaluate_arguments, attacked_data, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(tofu, "GENERATED", 8)
    run = tmp_path / "run"
    flags = ("--data", str(attacked_data), "--membership", ",".join(ATTACKS))
    flags += ("--reference", str(model_folder))
    assert main(evaluate_arguments("tofu", run, *flags)) == 0
    log, summary = (json.loads((run / name).read_text()) for name in (tofu.LOG, "summary.json"))
    assert list(log["membership"]) == list(summary["membership"]) == NAMES
    for name, sides in log["membership"].items():
        assert [len(sides[side]) for side in ("forget", "holdout")] == [4, 3]
        auc = metrics.membership_auc(**sides)
        assert summary["membership"][name]["auc"] == auc
        # The model knows the forget rows; a reference that is itself tells nothing apart.
        assert auc == (0.5 if name == "mia_reference" else 1.0), name
    assert summary["membership"]["mia_min_k"]["privleak"] == pytest.approx(-100)
    printed = capsys.readouterr().out
    assert "mia_min_k_plus_plus 1.0000" in printed and "PrivLeak -100.00 against 0.5" in printed
    other = {**log["membership"]["mia_min_k"], "holdout": [0.0, 1.0, 2.0]}
    compared = summary_of(log, {"membership": {"mia_min_k": other}}, "open-unlearning")
    reference = metrics.membership_auc(**other)
    assert compared["mia_min_k"]["retain_auc"] == reference
    assert compared["mia_min_k"]["privleak"] == metrics.privleak(1.0, reference)
    assert compared["mia_loss"]["retain_auc"] is None
    assert f"retain model {reference:.4f}   PrivLeak" in "".join(
        lines_of(compared, "open-unlearning")
    )


@pytest.mark.slow
def test_muse_reports_them_in_its_convention(evaluate_arguments, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--membership", "all", "--convention", "muse")
    assert main(evaluate_arguments("muse", run, *flags)) == 0
    log, summary = (json.loads((run / name).read_text()) for name in (muse.LOG, "summary.json"))
    assert list(log["membership"]) == NAMES[:-1]
    assert log["membership"]["mia_min_k"] == log["privleak"]
    assert summary["membership"]["mia_min_k"]["auc"] == summary["auc"]
    assert "membership AUC  0 where every forget row is known" in capsys.readouterr().out


@pytest.mark.slow
def test_gradnorm_merges_the_adapter_first(
    evaluate_arguments, attacked_data, new_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(tofu, "GENERATED", 8)
    model = new_model()
    fastbound.inject(model, rank=2, bound=0.1)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            parameter.data.normal_(0, 0.5, generator=generator)
    fastbound.save_adapter(model, tmp_path / "adapter")
    run = tmp_path / "run"
    flags = ("--data", str(attacked_data), "--membership", "gradnorm")
    flags += ("--adapter", str(tmp_path / "adapter"), "--rows", "2")
    assert main(evaluate_arguments("tofu", run, *flags)) == 0
    norms = json.loads((run / tofu.LOG).read_text())["membership"]["mia_gradnorm"]["forget"]
    assert len(norms) == 2 and np.min(norms) > 0


@pytest.mark.parametrize(
    ("which", "flags", "message"),
    [
        (
            "tofu",
            ("--membership", "gan"),
            "unknown membership attack 'gan': choose from loss, zlib",
        ),
        ("tofu", ("--membership", "reference"), "reference needs --reference"),
        ("tofu", ("--reference", "MODEL"), "--reference is for the membership attack of that name"),
        ("tofu", ("--membership", "loss"), "has no file holdout10"),
        ("tdec", ("--membership", "loss"), "tdec has no holdout rows"),
    ],
)
def test_what_cannot_be_attacked_is_refused(
    evaluate_arguments, model_folder, tmp_path, capsys, which, flags, message
):
    flags = tuple(str(model_folder) if flag == "MODEL" else flag for flag in flags)
    assert main(evaluate_arguments(which, tmp_path / "run", *flags)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""open-unlearning's TOFU_EVAL.json as a retain log: the same metrics as of TOFU's own layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastbound.unlearning import InputError, metrics
from fastbound.unlearning.metrics.open_unlearning import log_of
from fastbound.unlearning.metrics.sections import FORGET, SECTIONS

PREFIXES = dict(zip(SECTIONS, ("forget", "retain", "ra", "wf"), strict=True))
ROWS = 12


def own_log(seed):
    """A log in TOFU's layout."""
    random = np.random.default_rng(seed)
    return {
        section: {
            "avg_gt_loss": random.uniform(0.1, 1, ROWS).tolist(),
            "avg_paraphrased_loss": random.uniform(0.5, 2, ROWS).tolist(),
            "average_perturb_loss": random.uniform(1, 3, (ROWS, 3)).tolist(),
            "rougeL_recall": random.uniform(0.3, 1, ROWS).tolist(),
        }
        for section in SECTIONS
    }


def by_index(field, values):
    return {str(row): {"prob": 0.5, field: value} for row, value in enumerate(values)}


def evaluation(log):
    """The same values under open-unlearning's names, with its aggregates."""
    found = {"forget_quality": {"agg_value": None}, "model_utility": {"agg_value": 0.5}}
    for section, prefix in PREFIXES.items():
        part = log[section]
        named = {
            "Q_A_Prob": ("avg_loss", part["avg_gt_loss"]),
            "Q_A_PERT_Prob": ("avg_loss", part["average_perturb_loss"]),
            "Q_A_ROUGE": ("rougeL_recall", part["rougeL_recall"]),
        }
        if prefix in ("forget", "retain"):
            named["Q_A_PARA_Prob"] = ("avg_loss", part["avg_paraphrased_loss"])
        else:  # the answers themselves are the right ones there
            part["avg_paraphrased_loss"] = part["avg_gt_loss"]
        for name, (field, values) in named.items():
            found[f"{prefix}_{name}"] = {
                "agg_value": 0.1,
                "value_by_index": by_index(field, values),
            }
    ratios = metrics.truth_ratio(
        log[FORGET]["avg_paraphrased_loss"], log[FORGET]["average_perturb_loss"]
    )
    found["forget_truth_ratio"] = {"agg_value": 0.2, "value_by_index": by_index("score", ratios)}
    return found


@pytest.fixture
def logs(tmp_path):
    """The retain log in both layouts, and an unlearned one in TOFU's."""
    retain = own_log(1)
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(evaluation(retain)))
    return own_log(2), retain, path


@pytest.mark.parametrize("convention", metrics.TOFU_CONVENTIONS)
def test_forget_quality_and_utility_are_those_of_the_same_losses(logs, convention):
    unlearned, retain, path = logs
    expected = metrics.forget_quality(unlearned, retain, convention=convention)
    assert metrics.forget_quality(unlearned, path, convention=convention) == expected
    assert 0 < expected.statistic < 1
    utility = metrics.model_utility(retain, convention=convention)
    assert metrics.model_utility(path, convention=convention) == utility


def test_truth_ratios_alone_will_do_in_the_convention_they_are_of(logs):
    unlearned, retain, path = logs
    alone = {"forget_truth_ratio": json.loads(path.read_text())["forget_truth_ratio"]}
    expected = metrics.forget_quality(unlearned, retain)
    found = metrics.forget_quality(unlearned, alone)
    assert found.pvalue == pytest.approx(expected.pvalue, rel=1e-12)
    with pytest.raises(
        InputError,
        match="retain log has truth ratios in open-unlearning's convention, without the losses",
    ):
        metrics.forget_quality(unlearned, alone, convention="tofu")


def test_rows_are_taken_in_the_order_of_their_numbers(logs):
    _, retain, path = logs
    value = json.loads(path.read_text())
    for each in value.values():
        if "value_by_index" in each:
            each["value_by_index"] = dict(reversed(each["value_by_index"].items()))
    assert metrics.model_utility(value) == metrics.model_utility(retain)


def test_membership_scores_come_with_it():
    sides = {
        side: {"agg_value": 1.0, "value_by_index": by_index("score", values)}
        for side, values in (("forget", [1.0, 2.0]), ("holdout", [3.0, 4.0, 5.0]))
    }
    log = log_of({"mia_min_k": {**sides, "auc": 1.0, "agg_value": 1.0}}, "log")
    assert log["privleak"] == log["membership"]["mia_min_k"]
    assert list(log["privleak"]["holdout"].values()) == [3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"forget_quality": 0.3, "model_utility": 0.6}, "give the TOFU_EVAL.json"),
        ({"forget_truth_ratio": {"agg_value": 0.7}}, "aggregates without rows"),
    ],
)
def test_a_summary_is_refused_with_the_file_to_give(tmp_path, value, message):
    path = tmp_path / "TOFU_SUMMARY.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        metrics.read_log(path)


def test_a_row_without_a_value_is_named(logs):
    unlearned, _, path = logs
    value = json.loads(path.read_text())
    value["forget_Q_A_PARA_Prob"]["value_by_index"]["3"] = None
    with pytest.raises(InputError, match="avg_paraphrased_loss, row 3: nan is not finite"):
        metrics.forget_quality(unlearned, value)


def test_muses_own_log_is_left_as_it_is():
    log = {"privleak": {"forget": [1.0], "holdout": [2.0]}, "forget_verbmem": {"rougeL_f1": [0.1]}}
    assert metrics.read_log(log) is log

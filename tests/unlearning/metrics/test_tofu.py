"""Truth ratio, forget quality and model utility: published logs, reference pairs, edge cases."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import pytest

from fastbound.unlearning import InputError, metrics

FORGET = "eval_log_forget.json"
EXACT = 1e-9


def make_log(rows: int = 4, seed: int = 0) -> dict:
    random = np.random.default_rng(seed)
    log = {}
    for name, wrong in (
        ("eval_log.json", 5),
        ("eval_real_author_wo_options.json", 3),
        ("eval_real_world_wo_options.json", 3),
        (FORGET, 5),
    ):
        log[name] = {
            "avg_gt_loss": random.uniform(0.1, 2, rows).tolist(),
            "average_perturb_loss": random.uniform(1, 4, (rows, wrong)).tolist(),
            "avg_paraphrased_loss": random.uniform(0.5, 3, rows).tolist(),
            "rougeL_recall": random.uniform(0.1, 1, rows).tolist(),
        }
    return log


@pytest.fixture(scope="module")
def phi(data_folder):
    read = {
        name: json.loads((data_folder / "tofu" / f"{name}.json").read_text())
        for name in ("eval_phi_full_forget10", "eval_phi_retain90", "expected_phi_forget10")
    }
    return read["eval_phi_full_forget10"], read["eval_phi_retain90"], read["expected_phi_forget10"]


def test_published_logs_give_the_published_values(phi):
    full, retain, expected = phi
    quality = metrics.forget_quality(full, retain, convention="tofu")
    assert quality.pvalue == pytest.approx(expected["forget_quality_pvalue"], rel=EXACT)
    assert quality.statistic == pytest.approx(expected["ks_statistic"], rel=EXACT)
    for log, key in ((full, "model_utility_full"), (retain, "model_utility_retain90")):
        utility = metrics.model_utility(log, convention="tofu")
        assert utility.value == pytest.approx(expected[key], rel=EXACT)
        assert len(utility.components) == 9
    for section, parts in expected["components_full"].items():
        found = metrics.section_score(full, section, convention="tofu")
        assert found.probability == pytest.approx(parts["prob"], rel=EXACT)
        assert found.rouge == pytest.approx(parts["rouge"], rel=EXACT)
        assert found.truth_ratio == pytest.approx(parts["truth_ratio"], rel=EXACT)


def test_published_logs_by_file_and_in_tofus_own_mappings(phi, data_folder):
    full, retain, _ = phi
    own = copy.deepcopy(full)
    for section in own.values():
        for field, values in section.items():
            # TOFU keys by row, and nothing says that the keys come in order.
            section[field] = {str(i): values[i] for i in reversed(range(len(values)))}
    for convention in metrics.TOFU_CONVENTIONS:
        assert metrics.forget_quality(
            own, data_folder / "tofu" / "eval_phi_retain90.json", convention=convention
        ) == metrics.forget_quality(full, retain, convention=convention)
        assert metrics.model_utility(own, convention=convention) == metrics.model_utility(
            full, convention=convention
        )


def test_truth_ratio_aggregates_agree_with_each_other_on_the_reference(data_folder):
    reference = json.loads((data_folder / "metric_refs.json").read_text())["ou_truth_ratio"]
    output = reference["output"]

    def scores(name):
        return np.array([each["score"] for each in output[name]["value_by_index"].values()])

    ratio = scores("closer_to_1_better")
    assert metrics.closer_to_one(ratio) == pytest.approx(
        output["closer_to_1_better"]["agg_value"], rel=EXACT
    )
    assert metrics.true_better(ratio) == pytest.approx(
        output["true_better"]["agg_value"], rel=EXACT
    )
    retain = reference["retain_output"]
    other = np.array([each["score"] for each in retain["value_by_index"].values()])
    assert metrics.closer_to_one(other) == pytest.approx(retain["agg_value"], rel=EXACT)
    # One wrong answer of loss -log R against a right answer of loss 0 has the truth ratio R; then
    # prob_mean is 1/(1 + R), the epsilon aside.
    share = metrics.right_share(np.zeros(len(ratio)), -np.log(ratio)[:, None])
    np.testing.assert_allclose(share, scores("prob_mean"), rtol=1e-8)
    assert share.mean() == pytest.approx(output["prob_mean"]["agg_value"], rel=1e-8)
    np.testing.assert_allclose(
        metrics.truth_ratio(np.zeros(len(ratio)), -np.log(ratio)[:, None], convention="tofu"),
        ratio,
        rtol=EXACT,
    )


def test_truth_ratio_forms_by_hand():
    right, wrong = [0.5], [[1.0, 2.0]]
    assert metrics.truth_ratio(right, wrong)[0] == pytest.approx(
        math.exp(-1.5) / (math.exp(-0.5) + 1e-10), rel=1e-15
    )
    assert metrics.truth_ratio(right, wrong, convention="tofu")[0] == pytest.approx(math.exp(-1))
    assert metrics.truth_ratio(right, wrong, convention="tofu-paper")[0] == pytest.approx(
        (math.exp(-0.5) + math.exp(-1.5)) / 2
    )


def test_epsilon_makes_a_collapsed_model_look_different_only_in_open_unlearning():
    random = np.random.default_rng(0)
    log = make_log(20)
    log[FORGET]["avg_paraphrased_loss"] = random.uniform(1, 3, 20).tolist()
    log[FORGET]["average_perturb_loss"] = random.uniform(1, 3, (20, 5)).tolist()
    collapsed = copy.deepcopy(log)
    for field in ("avg_paraphrased_loss", "average_perturb_loss"):
        collapsed[FORGET][field] = (np.array(log[FORGET][field]) + 30).tolist()
    assert metrics.forget_quality(collapsed, log, convention="tofu").pvalue > 0.99
    found = metrics.forget_quality(collapsed, log)
    assert found.convention == "open-unlearning"
    assert found.statistic == 1
    assert found.pvalue == pytest.approx(found.floor, rel=EXACT)
    assert found.log10 == pytest.approx(math.log10(found.pvalue))


@pytest.mark.parametrize(
    ("n", "floor"), [(40, 1.9e-23), (64, 8.4e-38), (200, 1.9e-119), (400, 1.06e-239)]
)
def test_floor_of_forget_quality(n, floor):
    assert metrics.ks_floor(n, n) == pytest.approx(floor, rel=0.03)


def test_one_component_of_zero_makes_utility_zero():
    log = make_log()
    log["eval_log.json"]["rougeL_recall"] = [0.0] * 4
    assert metrics.model_utility(log).value == 0


def test_a_log_compared_with_itself_is_named():
    log = make_log()
    with pytest.warns(metrics.SameModelWarning, match="same losses"):
        assert metrics.forget_quality(log, copy.deepcopy(log)).pvalue == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.forget_quality(log, make_log(seed=1))


def _missing_section(log):
    del log[FORGET]


def _missing_field(log):
    del log[FORGET]["avg_paraphrased_loss"]


def _short(log):
    log[FORGET]["avg_paraphrased_loss"].pop()


def _nan(log):
    log[FORGET]["average_perturb_loss"][2][1] = float("nan")


def _ragged(log):
    log[FORGET]["average_perturb_loss"][1].pop()


def _empty(log):
    for field in log[FORGET]:
        log[FORGET][field] = []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _missing_section,
            r"retain log: section 'eval_log_forget.json' is missing; found eval_log",
        ),
        (_missing_field, r"field 'avg_paraphrased_loss' is missing; found avg_gt_loss"),
        (_short, r"different lengths \(avg_paraphrased_loss 3, average_perturb_loss 4\)"),
        (_nan, r"average_perturb_loss, row 2: .* is not finite"),
        (_ragged, r"the same number of them in every row"),
        (_empty, r"holds no rows"),
    ],
)
def test_a_bad_log_is_refused_by_section_and_field(spoil, message):
    bad = make_log(seed=1)
    spoil(bad)
    with pytest.raises(InputError, match=message):
        metrics.forget_quality(make_log(), bad)


@pytest.mark.parametrize("section", list(metrics.utility.PARTS.values()))
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda part: part.pop("rougeL_recall"), "field 'rougeL_recall' is missing; found avg_gt"),
        (lambda part: part["rougeL_recall"].pop(), "different lengths .*rougeL_recall 3"),
        (lambda part: part["avg_gt_loss"].__setitem__(1, math.nan), "avg_gt_loss, row 1: nan is n"),
        (lambda part: part["avg_gt_loss"].__setitem__(0, "low"), "one number per row"),
    ],
)
def test_utility_refuses_a_bad_section(section, spoil, message):
    log = make_log()
    spoil(log[section])
    with pytest.raises(InputError, match=f"log, {section}.*{message}"):
        metrics.model_utility(log)


def test_logs_of_different_rows_are_refused():
    with pytest.raises(InputError, match=r"different lengths in eval_log_forget.json: 4 and 5"):
        metrics.forget_quality(make_log(4), make_log(5))


def test_an_unknown_convention_lists_the_known():
    for call in (metrics.model_utility, lambda log, **k: metrics.forget_quality(log, log, **k)):
        with pytest.raises(InputError, match="open-unlearning, tofu, tofu-paper; got 'paper'"):
            call(make_log(), convention="paper")


def test_a_log_file_that_is_not_one_is_named(tmp_path):
    (tmp_path / "log.json").write_text("[]")
    with pytest.raises(InputError, match=r"log.json holds list"):
        metrics.model_utility(tmp_path / "log.json")
    with pytest.raises(InputError, match="cannot be read"):
        metrics.model_utility(tmp_path / "none.json")

"""Memorisation, privacy and ROUGE against values that the original repositories' functions gave."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fastbound.unlearning import InputError, metrics
from fastbound.unlearning.metrics.tokens import vocabulary_log_probabilities

# The repositories computed these in fp32: four units of its last place may differ.
FP32 = {"rel": 5e-7, "abs": 0}
# The relative error of e^-loss is the absolute one of a loss of 14 nats.
FP32_OF_EXP = {"rel": 2e-6, "abs": 0}
EXACT = 1e-9


@pytest.fixture(scope="module")
def references(data_folder):
    return json.loads((data_folder / "metric_refs.json").read_text())


def batch(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"])


def values(output: dict) -> list[float]:
    return [each["score"] for each in output["value_by_index"].values()]


def test_probability_memorisation_and_strength_of_explicit_logits(references):
    reference = references["ou_logits_metrics"]
    output = reference["output"]
    scores = metrics.answer_scores(*batch(reference["input"]))
    for score, expected in zip(scores, output["evaluate_probability"], strict=True):
        assert score.loss == pytest.approx(expected["avg_loss"], **FP32)
        assert score.probability == pytest.approx(expected["prob"], **FP32_OF_EXP)
    inner = [score.without_end() for score in scores]
    for score, expected in zip(inner, output["tokenwise_logprobs"], strict=True):
        assert score.log_probabilities.tolist() == pytest.approx(expected, **FP32)
    exact = [metrics.exact_memorisation(score.correct) for score in inner]
    assert exact == pytest.approx(values(output["exact_memorization"]), rel=1e-7)
    assert np.mean(exact) == pytest.approx(output["exact_memorization"]["agg_value"], rel=1e-7)
    strength = [metrics.extraction_strength(score.correct) for score in inner]
    assert strength == pytest.approx(values(output["extraction_strength"]), rel=EXACT)
    assert np.mean(strength) == pytest.approx(output["extraction_strength"]["agg_value"], rel=EXACT)


def test_membership_attacks_and_their_auc(references):
    reference = references["ou_mia"]
    sides = {
        "forget": batch(references["ou_logits_metrics"]["input"]),
        "holdout": batch(reference["input"]["holdout"]),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for side, (logits, labels) in sides.items():
        whole = metrics.answer_scores(logits, labels)
        scores = [score.without_end().log_probabilities for score in whole]
        vocabulary = [each[:-1] for each in vocabulary_log_probabilities(logits, labels)]
        both = list(zip(scores, vocabulary, strict=True))
        for name, each in {
            "loss": [score.loss for score in whole],
            "min_k_0.4": [metrics.min_k(score, 0.4) for score in scores],
            "min_k_0.2": [metrics.min_k(score, 0.2) for score in scores],
            "min_k++_0.4": [metrics.min_k_plus_plus(*pair, 0.4) for pair in both],
        }.items():
            found.setdefault(name, {})[side] = each
    assert set(found) == set(reference["output"])
    for name, expected in reference["output"].items():
        for side in sides:
            assert found[name][side] == pytest.approx(values(expected[side]), **FP32), name
            mean = expected[side]["agg_value"]
            assert np.mean(found[name][side]) == pytest.approx(mean, **FP32), name
        auc = metrics.membership_auc(**found[name])
        assert auc == pytest.approx(expected["auc"], rel=EXACT)
        assert metrics.membership_auc(**found[name], convention="muse") == pytest.approx(1 - auc)


def test_privleak_of_the_reference(references):
    for case, expected in references["ou_privleak"]["output"].items():
        parts = [float(part.partition("=")[2]) for part in case.split(",") if "=" in part]
        assert metrics.privleak(*parts) == pytest.approx(expected["agg_value"], rel=EXACT, abs=1e-9)


def test_both_signs_of_privleak_say_the_same():
    for auc, reference in ((0.98, 0.45), (0.2, 0.47), (0.5, 0.5)):
        own = metrics.privleak(auc, reference)
        muse = metrics.privleak(1 - auc, 1 - reference, convention="muse")
        assert own == pytest.approx(muse, rel=1e-8)
    with pytest.raises(InputError, match="knows the forget set"):
        metrics.privleak(0.5, 0.0, convention="muse")
    with pytest.raises(InputError, match=r"auc must lie in 0 .. 1, got 1.5"):
        metrics.privleak(1.5)


def test_min_k_of_a_text_too_short_for_its_share():
    assert metrics.min_k([-1.0, -3.0], 0.4) == 3
    assert math.isnan(metrics.min_k([-1.0, -3.0], 0.4, convention="muse"))


def test_rouge_with_and_without_the_stemmer(references):
    for case in references["rouge"]["cases"]:
        stemmed = metrics.rouge(case["gt"], case["gen"])
        plain = metrics.rouge(case["gt"], case["gen"], stemmer=False)
        assert stemmed.rougeL_recall == pytest.approx(
            case["stemmer_rougeL_recall(TOFU)"], rel=EXACT
        )
        assert stemmed.rougeL_f1 == pytest.approx(case["stemmer_rougeL_f1"], rel=EXACT)
        assert stemmed.rouge1_recall == pytest.approx(case["stemmer_rouge1_recall"], rel=EXACT)
        assert plain.rougeL_f1 == pytest.approx(case["nostem_rougeL_f1(MUSE)"], rel=EXACT)


def test_extraction_likelihood_and_memorisation_accuracy_of_a_bigram_model(references):
    reference = references["tdec_el_ma"]
    follow, sequences = reference["input"]["bigram_next"], reference["input"]["sequences"]
    accuracies = []
    for row, tokens in enumerate(sequences):
        T = len(tokens)
        continuations = []
        for i in range(1, T):
            continuation = [tokens[i - 1]]
            while len(continuation) <= T - i:
                continuation.append(follow[continuation[-1]])
            continuations.append(continuation[1:])
        for n in reference["input"]["el_n"]:
            found = metrics.extraction_likelihood(continuations, tokens, n)
            expected = reference["output"][f"el_{n}-gram"][row]
            assert found == pytest.approx(expected, rel=5e-8, abs=1e-12)
        predicted = [follow[token] for token in tokens[:-1]]
        found = metrics.memorisation_accuracy(predicted, tokens)
        assert found == pytest.approx(reference["output"]["ma_per_example"][row], rel=5e-8)
        accuracies.append(found)
    assert np.mean(accuracies) == pytest.approx(reference["output"]["ma_batch"], rel=EXACT)


@pytest.mark.parametrize(
    ("correct", "strength"),
    [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 0, 1, 0], 0.25), ([0], 1.0)],
)
def test_extraction_strength_counts_the_tokens_after_the_last_wrong_one(correct, strength):
    assert metrics.extraction_strength(np.array(correct, dtype=bool)) == strength


def test_token_metrics_refuse_what_has_no_tokens():
    for call in (metrics.exact_memorisation, metrics.extraction_strength, metrics.min_k):
        with pytest.raises(InputError, match=r"one answer|one text"):
            call([])
    with pytest.raises(InputError, match="1 <= n < number of tokens, got n=10, 5 tokens"):
        metrics.extraction_likelihood([[]] * 4, [1, 2, 3, 4, 5])

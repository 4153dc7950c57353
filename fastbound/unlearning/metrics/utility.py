"""TOFU's model utility: how much of what should be kept has been kept."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning.metrics.conventions import (
    EPSILON,
    OPEN_UNLEARNING,
    check_convention,
)
from fastbound.unlearning.metrics.logs import (
    Log,
    check_lengths,
    column,
    losses,
    read_log,
)
from fastbound.unlearning.metrics.sections import FORGET, REAL_AUTHORS, RETAIN, WORLD_FACTS
from fastbound.unlearning.metrics.truth import closer_to_one, true_better, truth_ratio

PARTS = {"retain": RETAIN, "real_authors": REAL_AUTHORS, "world_facts": WORLD_FACTS}


@dataclass(frozen=True)
class SectionScore:
    """Means over the rows of one section of a log."""

    probability: float
    rouge: float
    truth_ratio: float


@dataclass(frozen=True)
class ModelUtility:
    """Harmonic mean of nine components, three for each of three sections; 0 if any is 0.

    Attributes:
        value: the harmonic mean.
        components: "retain_probability", "retain_rouge", "retain_truth_ratio", and the same for
            "real_authors" and "world_facts".
        convention: whose definitions are used.
    """

    value: float
    components: Mapping[str, float]
    convention: str


def model_utility(log: Log | str | Path, *, convention: str = OPEN_UNLEARNING) -> ModelUtility:
    """Utility from TOFU's aggregated evaluation.

    Raises:
        InputError: a section or field is missing, fields differ in length, a value is not finite,
            or the convention is unknown.
    """
    log = read_log(log)
    components = {
        f"{part}_{name}": value
        for part, section in PARTS.items()
        for name, value in vars(section_score(log, section, convention=convention)).items()
    }
    return ModelUtility(harmonic_mean(list(components.values())), components, convention)


def section_score(log: Log, section: str, *, convention: str = OPEN_UNLEARNING) -> SectionScore:
    """Probability, ROUGE-L recall and truth ratio of one section.

    For the forget and retain sections the probability is that of the answer, e^-loss; for real
    authors and world facts it is its share among the offered answers. The truth ratio is
    `closer_to_one` for the forget section and `true_better` for the others.
    """
    check_convention(convention)
    answer = column(log, section, "avg_gt_loss")
    rouge = column(log, section, "rougeL_recall")
    right, wrong = losses(log, section)
    check_lengths("log", section, avg_gt_loss=answer, rougeL_recall=rouge, other_losses=right)
    if section in (RETAIN, FORGET):
        likely = np.exp(-answer)
    else:
        likely = probability_among(answer, wrong, convention=convention)
    ratio = truth_ratio(right, wrong, convention=convention)
    kept = closer_to_one(ratio, convention=convention) if section == FORGET else true_better(ratio)
    return SectionScore(float(likely.mean()), float(rouge.mean()), kept)


def probability_among(answer: Any, wrong: Any, *, convention: str = OPEN_UNLEARNING) -> np.ndarray:
    """p / (p + Σ_j p_wrong_j + ε), p = e^-loss; ε is 1e-10, or 0 for TOFU's own code."""
    check_convention(convention)
    epsilon = EPSILON if convention == OPEN_UNLEARNING else 0.0
    p = np.exp(-np.asarray(answer, dtype=np.float64))
    p_wrong = np.exp(-np.asarray(wrong, dtype=np.float64)).sum(-1)
    with np.errstate(invalid="ignore"):
        share = p / (p + p_wrong + epsilon)
    if not np.isfinite(share).all():
        raise InputError(
            "every answer has probability 0 in float64, so that its share is undefined without "
            "epsilon: use convention 'open-unlearning'"
        )
    return share


def harmonic_mean(values: Any) -> float:
    """Harmonic mean of values >= 0; it is 0 if any value is."""
    return statistics.harmonic_mean(np.asarray(values, dtype=np.float64).ravel().tolist())

"""TOFU's truth ratio, and forget quality: are its values those of a model that never knew?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError, require
from fastbound.unlearning.metrics.conventions import (
    EPSILON,
    OPEN_UNLEARNING,
    TOFU_PAPER,
    check_convention,
)
from fastbound.unlearning.metrics.logs import Log, column, losses, read_log
from fastbound.unlearning.metrics.sections import FORGET


class SameModelWarning(UserWarning):
    """The retain log comes from the model under test, so that comparing them is meaningless."""


@dataclass(frozen=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test over truth ratios.

    Attributes:
        pvalue: 1 if the two samples cannot be told apart.
        statistic: largest distance between the two empirical distributions.
        log10: logarithm of `pvalue`, for display.
        floor: the lowest possible p-value for `n` and `n_retain` rows (statistic 1).
        n, n_retain: rows of the unlearned log and of the retain log.
        convention: whose definition of the truth ratio.
    """

    pvalue: float
    statistic: float
    log10: float
    floor: float
    n: int
    n_retain: int
    convention: str


def truth_ratio(right: Any, wrong: Any, *, convention: str = OPEN_UNLEARNING) -> np.ndarray:
    """How much likelier wrong answers are than the right one, R `[rows]`.

    With L the mean loss per token of an answer, in nats:

        open-unlearning   exp(-mean_j L_wrong_j) / (exp(-L_right) + 1e-10)
        tofu              exp(L_right - mean_j L_wrong_j)          aggregate_eval_stat.py
        tofu-paper        mean_j exp(-L_wrong_j) / exp(-L_right)   the paper and utils.py

    The epsilon sends R to 0 once losses pass 23 nats; the other two do not change when every loss
    grows by the same amount.

    Args:
        right: losses of the right (paraphrased) answers `[rows]`.
        wrong: losses of the wrong answers `[rows, wrong answers]`.

    Raises:
        InputError: unknown convention, lengths that differ, or losses that are not finite.
    """
    check_convention(convention)
    right = np.asarray(right, dtype=np.float64)
    wrong = np.asarray(wrong, dtype=np.float64)
    if right.ndim != 1 or wrong.ndim != 2 or len(right) != len(wrong):
        raise InputError(
            f"needs losses [rows] and [rows, wrong], got {right.shape} and {wrong.shape}"
        )
    if not (np.isfinite(right).all() and np.isfinite(wrong).all()):
        raise InputError("the truth ratio needs finite losses: the model has collapsed")
    if convention == OPEN_UNLEARNING:
        return np.exp(-wrong.mean(-1)) / (np.exp(-right) + EPSILON)
    if convention == TOFU_PAPER:
        return np.exp(right[:, None] - wrong).mean(-1)
    return np.exp(right - wrong.mean(-1))


def closer_to_one(ratio: np.ndarray, *, convention: str = OPEN_UNLEARNING) -> float:
    """Truth ratio of forget rows: mean of min(R, 1/R); 1 if right and wrong are equally likely."""
    check_convention(convention)
    epsilon = EPSILON if convention == OPEN_UNLEARNING else 0.0
    with np.errstate(divide="ignore"):  # R = 0: the minimum is R
        return float(np.minimum(ratio, 1 / (ratio + epsilon)).mean())


def true_better(ratio: np.ndarray) -> float:
    """Truth ratio of rows to retain: mean of max(0, 1 - R); 1 if no wrong answer is likely."""
    return float(np.maximum(0.0, 1.0 - ratio).mean())


def right_share(right: Any, wrong: Any) -> np.ndarray:
    """open-unlearning's `prob_mean`, c / (c + w + 1e-10).

    c is the probability of the right answer and w the geometric mean of the wrong ones.
    """
    c = np.exp(-np.asarray(right, dtype=np.float64))
    w = np.exp(-np.asarray(wrong, dtype=np.float64).mean(-1))
    return c / (c + w + EPSILON)


def forget_ratios(log: Log, *, convention: str = OPEN_UNLEARNING, name: str = "log") -> np.ndarray:
    """R `[rows]` of a log's forget rows: from their losses, or as open-unlearning's file has it.

    Raises InputError for a log with neither, or with only R if another convention is asked for.
    """
    section = log.get(FORGET)
    if isinstance(section, Mapping) and "avg_paraphrased_loss" not in section:
        if "truth_ratio" in section and convention != OPEN_UNLEARNING:
            raise InputError(
                f"{name} has truth ratios in open-unlearning's convention, without the losses: "
                f"convention {convention!r} needs forget_Q_A_PARA_Prob and forget_Q_A_PERT_Prob"
            )
        if "truth_ratio" in section:
            return column(log, FORGET, "truth_ratio", name)
    return truth_ratio(*losses(log, FORGET, name), convention=convention)


def forget_quality(
    unlearned_log: Log | str | Path,
    retain_log: Log | str | Path,
    *,
    convention: str = OPEN_UNLEARNING,
) -> ForgetQuality:
    """Do the truth ratios of the forget rows come from the distribution of a model never taught?

    Args:
        unlearned_log: TOFU's aggregated evaluation of the unlearned model, or its file.
        retain_log: the same of a model trained only on the retain rows.

    Raises:
        InputError: a field is missing or not finite, the logs cover different numbers of rows, or
            the convention is unknown.

    Warns:
        SameModelWarning: both logs hold the same losses.
    """
    require("evaluation", "forget_quality", "scipy")
    from scipy.stats import ks_2samp

    check_convention(convention)
    samples = [
        forget_ratios(read_log(log), convention=convention, name=name)
        for log, name in ((unlearned_log, "unlearned log"), (retain_log, "retain log"))
    ]
    if len(samples[0]) != len(samples[1]):
        raise InputError(
            f"unlearned log and retain log have different lengths in {FORGET}: "
            f"{len(samples[0])} and {len(samples[1])} rows; evaluate both models on the same rows"
        )
    if np.array_equal(samples[0], samples[1]):
        warn_same_model("forget quality")
    test = ks_2samp(*samples)
    n, m = map(len, samples)
    pvalue = float(test.pvalue)
    return ForgetQuality(
        pvalue=pvalue,
        statistic=float(test.statistic),
        log10=math.log10(pvalue) if pvalue > 0 else -math.inf,
        floor=ks_floor(n, m),
        n=n,
        n_retain=m,
        convention=convention,
    )


def ks_floor(n: int, m: int) -> float:
    """The exact two-sided p-value at statistic 1, 2 / C(n + m, n): 1e-239 for n = m = 400."""
    # By logarithms, because from n = 512 on the count exceeds a float.
    return math.exp(math.log(2) + math.lgamma(n + 1) + math.lgamma(m + 1) - math.lgamma(n + m + 1))


def warn_same_model(metric: str) -> None:
    """Warn that `metric` compares a model with itself."""
    warnings.warn(
        f"the retain log has the same losses as the log under test: {metric} compares a model "
        "with itself and is meaningless; give the log of a model trained without the forget rows",
        SameModelWarning,
        stacklevel=3,
    )

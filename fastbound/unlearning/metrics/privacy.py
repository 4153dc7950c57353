"""Membership inference from likelihoods: scores of attacks, their AUC, and MUSE's PrivLeak."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from fastbound.errors import InputError, require
from fastbound.unlearning.metrics.conventions import (
    EPSILON,
    MUSE,
    MUSE_CONVENTIONS,
    OPEN_UNLEARNING,
    check_convention,
)

# MUSE's constants for models retrained without the forget set, in MUSE's own sign: Min-40 %.
AUC_RETRAIN = {"news": 0.4772, "books": 0.5393}


def min_k(log_probabilities: Any, k: float = 0.4, *, convention: str = OPEN_UNLEARNING) -> float:
    """Minus the mean of the lowest k·n token log-probabilities; low for a text the model knows.

    Args:
        log_probabilities: `[n]`, of every token of one text.
        k: share of the tokens, 0 < k <= 1.
        convention: if int(k·n) = 0, "open-unlearning" uses one token and "muse" gives NaN.
    """
    check_convention(convention, MUSE_CONVENTIONS)
    values = np.sort(_text(log_probabilities))
    if convention == MUSE and _share(len(values), k) == 0:
        return math.nan
    return -float(values[: max(1, _share(len(values), k))].mean())


def min_k_plus_plus(log_probabilities: Any, vocabulary: Any, k: float = 0.4) -> float:
    """Min-K %++: `min_k` of log-probabilities that are standardised at each position.

    z = (log p(x_i) - μ_i) / σ_i, μ and σ² the mean and variance of log p over the vocabulary under
    p itself; σ² is at least 1e-6. Zhang et al. 2024.

    Args:
        log_probabilities: `[n]`, of every token of one text.
        vocabulary: `[n, V]`, of every token of the vocabulary.
    """
    own, all_ = _text(log_probabilities), np.asarray(vocabulary, dtype=np.float64)
    if all_.ndim != 2 or len(all_) != len(own):
        raise InputError(f"vocabulary must be [{len(own)}, V], got shape {all_.shape}")
    p = np.exp(all_)
    # 0 · (-inf) counts as 0: an impossible token contributes nothing.
    weighted = np.where(p > 0, p * np.where(p > 0, all_, 0), 0)
    mean = weighted.sum(-1)
    variance = (weighted * np.where(p > 0, all_, 0)).sum(-1) - mean**2
    scores = np.sort((own - mean) / np.sqrt(np.maximum(variance, 1e-6)))
    return -float(scores[: max(1, _share(len(scores), k))].mean())


def zlib_ratio(loss: float, text: str) -> float:
    """Loss divided by the bytes of the compressed text, because a dull text is likely anyway.

    Carlini et al. 2021, "Extracting training data from large language models", section 5.2; the
    loss is a mean over tokens, as in open-unlearning's mia_zlib.

    Raises InputError for a loss that is not finite.
    """
    return _loss("loss", loss) / len(zlib.compress(text.encode("utf-8")))


def reference_difference(loss: float, reference: float) -> float:
    """Loss minus that of another model that never saw the text, which is what it costs by itself.

    Carlini et al. 2021, section 5.2 ("comparing to other neural language models"), as in
    open-unlearning's mia_reference.

    Raises InputError for a loss that is not finite.
    """
    return _loss("loss", loss) - _loss("reference", reference)


def gradient_norm(norms: Any) -> float:
    """Mean over a model's parameters of the 2-norm of a text's gradient; low for a known text.

    Wang et al. 2024, "Pandora's white-box", arXiv 2402.17012, as in open-unlearning's mia_gradnorm.

    Args:
        norms: 2-norms of the gradient of the text's mean loss, one per parameter.
    """
    values = np.asarray(norms, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise InputError("norms must hold one finite number >= 0 per parameter, and at least one")
    return float(values.mean())


def membership_auc(forget: Any, holdout: Any, *, convention: str = OPEN_UNLEARNING) -> float:
    """Area under the ROC curve of telling forget rows from holdout rows by their scores.

    "open-unlearning": 1 if every forget row scores below (is likelier than) every holdout row.
    "muse": 0 in that case; one is 1 minus the other. Both are 0.5 if they cannot be told apart.

    Args:
        forget, holdout: attack scores such as `min_k`, low for a known text.
    """
    require("evaluation", "membership_auc", "sklearn")
    from sklearn.metrics import roc_auc_score

    check_convention(convention, MUSE_CONVENTIONS)
    forget, holdout = (np.asarray(each, dtype=np.float64) for each in (forget, holdout))
    if not (forget.size and holdout.size):
        raise InputError("AUC needs at least one forget and one holdout row")
    scores = np.concatenate([forget, holdout])
    if not np.isfinite(scores).all():
        raise InputError("AUC needs finite scores: the model has collapsed")
    member = np.concatenate([np.zeros(len(forget)), np.ones(len(holdout))])
    return float(roc_auc_score(member, -scores if convention == MUSE else scores))


def privleak(auc: float, reference: float = 0.5, *, convention: str = OPEN_UNLEARNING) -> float:
    """How far the AUC is from that of a model retrained without the forget set, in percent.

        open-unlearning   ((1 - auc) - (1 - reference)) / ((1 - reference) + 1e-10) · 100
        muse              (auc - reference) / reference · 100

    About -100 means not unlearned, 0 is ideal, and above 0 means over-unlearned. Both AUCs must
    come from `membership_auc` in the same convention; then the two forms agree up to the epsilon.

    Args:
        reference: AUC of the retrained model; `AUC_RETRAIN` has MUSE's, in MUSE's sign.

    Raises:
        InputError: an AUC outside 0 .. 1, or a reference that makes the ratio meaningless.
    """
    check_convention(convention, MUSE_CONVENTIONS)
    for name, value in (("auc", auc), ("reference", reference)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} must lie in 0 .. 1, got {value}")
    if convention == MUSE:
        if reference == 0:
            raise InputError(
                "reference AUC is 0, as of a model that knows the forget set: give the AUC of a "
                "model retrained without it"
            )
        return (auc - reference) / reference * 100
    return ((1 - auc) - (1 - reference)) / ((1 - reference) + EPSILON) * 100


def _text(log_probabilities: Any) -> np.ndarray:
    values = np.asarray(log_probabilities, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise InputError(f"needs the log-probabilities of one text, got shape {values.shape}")
    return values


def _share(n: int, k: float) -> int:
    if not 0 < k <= 1:
        raise InputError(f"k is a share of the tokens, 0 < k <= 1, got {k}")
    return int(n * k)


def _loss(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise InputError(f"{name} must be finite, got {value}: the model has collapsed")
    return float(value)

"""Metrics of unlearning, from losses, tokens and texts; `docs/evaluation.md` lists them."""

from fastbound.unlearning.metrics.conventions import MUSE_CONVENTIONS, TOFU_CONVENTIONS
from fastbound.unlearning.metrics.logs import read_log
from fastbound.unlearning.metrics.memorisation import (
    EL10_THRESHOLD,
    MA_THRESHOLD,
    exact_memorisation,
    extraction_likelihood,
    extraction_strength,
    memorisation_accuracy,
)
from fastbound.unlearning.metrics.privacy import (
    AUC_RETRAIN,
    gradient_norm,
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_difference,
    zlib_ratio,
)
from fastbound.unlearning.metrics.texts import Rouge, exact_match, rouge, unigram_f1
from fastbound.unlearning.metrics.tokens import AnswerScore, answer_scores
from fastbound.unlearning.metrics.truth import (
    ForgetQuality,
    SameModelWarning,
    closer_to_one,
    forget_quality,
    ks_floor,
    right_share,
    true_better,
    truth_ratio,
)
from fastbound.unlearning.metrics.utility import (
    ModelUtility,
    SectionScore,
    harmonic_mean,
    model_utility,
    probability_among,
    section_score,
)

__all__ = [
    "AUC_RETRAIN",
    "EL10_THRESHOLD",
    "MA_THRESHOLD",
    "MUSE_CONVENTIONS",
    "TOFU_CONVENTIONS",
    "AnswerScore",
    "ForgetQuality",
    "ModelUtility",
    "Rouge",
    "SameModelWarning",
    "SectionScore",
    "answer_scores",
    "closer_to_one",
    "exact_match",
    "exact_memorisation",
    "extraction_likelihood",
    "extraction_strength",
    "forget_quality",
    "gradient_norm",
    "harmonic_mean",
    "ks_floor",
    "membership_auc",
    "memorisation_accuracy",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "privleak",
    "probability_among",
    "read_log",
    "reference_difference",
    "right_share",
    "rouge",
    "section_score",
    "true_better",
    "truth_ratio",
    "unigram_f1",
    "zlib_ratio",
]

"""The losses of unlearning, and cross-entropy from whole logits or in chunks.

Uses `data`.
"""

from fastbound.unlearning.losses.chunked import chunked_answer_tokens
from fastbound.unlearning.losses.formulas import (
    AnswerTokens,
    GradientDifference,
    answer_tokens,
    dpo,
    flooding,
    gradient_difference,
    npo,
    row_likelihoods,
    satimp,
    simnpo,
    wga,
)
from fastbound.unlearning.losses.hidden import control_vector, rmu
from fastbound.unlearning.losses.logits import ceu, ihl, pdu, retain_kl, undial

__all__ = [
    "AnswerTokens",
    "GradientDifference",
    "answer_tokens",
    "ceu",
    "chunked_answer_tokens",
    "control_vector",
    "dpo",
    "flooding",
    "gradient_difference",
    "ihl",
    "npo",
    "pdu",
    "retain_kl",
    "rmu",
    "row_likelihoods",
    "satimp",
    "simnpo",
    "undial",
    "wga",
]

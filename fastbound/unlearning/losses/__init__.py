"""The losses of unlearning, and cross-entropy from whole logits or in chunks.

Uses `data`.
"""

from fastbound.unlearning.losses.chunked import chunked_answer_tokens
from fastbound.unlearning.losses.formulas import (
    AnswerTokens,
    GradientDifference,
    answer_tokens,
    dpo,
    gradient_difference,
    ihl,
    npo,
    retain_kl,
    row_likelihoods,
    simnpo,
)

__all__ = [
    "AnswerTokens",
    "GradientDifference",
    "answer_tokens",
    "chunked_answer_tokens",
    "dpo",
    "gradient_difference",
    "ihl",
    "npo",
    "retain_kl",
    "row_likelihoods",
    "simnpo",
]

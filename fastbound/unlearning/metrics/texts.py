"""ROUGE of generated text against the text that was expected."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple


class Rouge(NamedTuple):
    """ROUGE-1 recall, and ROUGE-L recall and F1."""

    rouge1_recall: float
    rougeL_recall: float
    rougeL_f1: float


def rouge(expected: str, generated: str, *, stemmer: bool = True) -> Rouge:
    """Scores of rouge-score; nothing generated scores 0.

    Args:
        stemmer: match word stems, as TOFU and open-unlearning do; MUSE's own code does not.
    """
    scores = _scorer(stemmer).score(expected, generated)
    return Rouge(
        float(scores["rouge1"].recall),
        float(scores["rougeL"].recall),
        float(scores["rougeL"].fmeasure),
    )


@lru_cache(maxsize=2)
def _scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)

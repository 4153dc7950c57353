"""Comparing generated text with the expected text: ROUGE, unigram F1, exact match."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

from fastbound.errors import require


class Rouge(NamedTuple):
    """ROUGE-1 recall, and ROUGE-L recall and F1."""

    rouge1_recall: float
    rougeL_recall: float
    rougeL_f1: float


def rouge(expected: str, generated: str, *, stemmer: bool = True) -> Rouge:
    """Scores of the package rouge-score; an empty generated text scores 0.

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
    require("evaluation", "ROUGE", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=stemmer)


def unigram_f1(expected: str, generated: str) -> float:
    """Harmonic mean of precision and recall of words, counting repeats.

    F1 = 2 p r / (p + r) = 2 · shared / (expected + generated); 0 if no word is shared.
    Words are those of SQuAD's evaluation: lower case, without punctuation and a, an, the. Jang et
    al. 2023 score TDEC's dialogues and completions with it.
    """
    wanted, given = _words(expected), _words(generated)
    shared = (Counter(wanted) & Counter(given)).total()
    return 2 * shared / (len(wanted) + len(given)) if shared else 0.0


def exact_match(expected: str, generated: str) -> bool:
    """Whether both texts have the same words, as `unigram_f1` defines them."""
    return _words(expected) == _words(generated)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()

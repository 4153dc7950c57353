"""Machine unlearning by gradient difference: a user of fastbound's public names like any other."""

from fastbound.errors import InputError, NonFiniteError
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded, collate, encode
from fastbound.unlearning.data.rows import Row, authors, load_rows
from fastbound.unlearning.losses import gradient_difference
from fastbound.unlearning.metrics.answers import Score, evaluate
from fastbound.unlearning.training.loop import Evaluation, UnlearnResult, unlearn

__all__ = [
    "Encoded",
    "Evaluation",
    "InputError",
    "NonFiniteError",
    "Row",
    "Score",
    "UnlearnConfig",
    "UnlearnResult",
    "authors",
    "collate",
    "encode",
    "evaluate",
    "gradient_difference",
    "load_rows",
    "unlearn",
]

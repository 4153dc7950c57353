"""Machine unlearning by gradient difference: a user of fastbound's public names like any other."""

from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data import Row, authors, load_rows
from fastbound.unlearning.encoding import Encoded, collate, encode
from fastbound.unlearning.errors import InputError, NonFiniteError
from fastbound.unlearning.evaluate import Score, evaluate
from fastbound.unlearning.loop import Evaluation, UnlearnResult, unlearn
from fastbound.unlearning.losses import gradient_difference

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

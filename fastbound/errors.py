"""The two ways a run ends that are not a bug, and a check that ends it in the first."""

from __future__ import annotations

import math
from typing import SupportsFloat


class InputError(ValueError):
    """What the user gave cannot be used; the message names it and the remedy. Nothing was done."""


class NotThereError(InputError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient stopped being finite; the last checkpoint is intact."""


def positive(name: str, value: object) -> float:
    """The value as a float, or an InputError naming it."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value!r}")
    return number

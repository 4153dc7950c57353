"""The ways a run can end that are not a bug, its warnings, and checks of single values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import SupportsFloat


class InputError(ValueError):
    """What the user gave cannot be used; the message names it and the remedy. Nothing was done."""


class NotThereError(InputError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient stopped being finite; the last checkpoint is intact."""


class StoppedError(RuntimeError):
    """Something outside ended the run on its way; what it has written is intact."""


class DamageWarning(UserWarning):
    """A file of a run was found damaged and cut back, or cannot be guarded; the run goes on."""


def positive(name: str, value: object) -> float:
    """The value as a float, or an InputError naming it."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except OverflowError:  # whose digits may be too many to print
        raise InputError(
            f"{name} must be positive and finite, got an integer beyond 1e308"
        ) from None
    except (RuntimeError, TypeError, ValueError):  # an array or a tensor of several numbers
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value!r}")
    return number


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise an InputError that names the nearest of `allowed`, unless the value is one of them."""
    if value not in allowed:
        raise InputError(
            f"{name} must be one of {', '.join(allowed)}; got {value!r}"
            f"{did_you_mean(value, allowed)}"
        )


def did_you_mean(value: object, known: Iterable[str], *, before: str = "") -> str:
    """The end of a message, `: did you mean x?`, or nothing if no known name is near.

    Args:
        before: what stands before a known name where it is used, such as the dashes of an option.
    """
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f": did you mean {before}{near[0]}?" if near else ""

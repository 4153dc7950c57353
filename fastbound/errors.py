"""Exceptions, warnings and messages for problems that are not bugs, and checks of single values."""

from __future__ import annotations

import difflib
import importlib.util
import math
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsFloat, SupportsIndex


class InputError(ValueError):
    """Unusable input; the message names it and the remedy. Raised before anything is changed."""


class NotThereError(InputError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class NonFiniteError(ArithmeticError):
    """The loss or its gradient is no longer finite; the last checkpoint is intact."""


class StoppedError(RuntimeError):
    """The run was interrupted from outside; everything it has written is intact."""


class DamageWarning(UserWarning):
    """A file of a run was damaged and has been truncated, or cannot be locked; the run goes on."""


def require(extra: str, what: str, *modules: str) -> None:
    """Check that the optional packages that something needs are installed.

    Args:
        extra: the extra of fastbound that installs them, such as "evaluation".
        what: what needs them; the message begins with it.
        modules: the names by which the packages are imported.

    Raises:
        InputError: a package is missing; the message names it and the command that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what} needs {' and '.join(missing)}, not installed here: "
            f'pip install "fastbound[{extra}]"'
        )


def positive(name: str, value: object) -> float:
    """The value as a float. Raises InputError, which names it, unless it is positive and finite."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except OverflowError:  # the integer may have too many digits to print
        raise InputError(
            f"{name} must be positive and finite, got an integer beyond 1e308"
        ) from None
    except (RuntimeError, TypeError, ValueError):  # an array or a tensor of several numbers
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise InputError(f"{name} must be positive and finite, got {value!r}")
    return number


def counted(name: str, value: object) -> int:
    """The value as an int. Raises InputError, which names it, unless it is an integer from 1 on."""
    try:
        number = operator.index(value) if isinstance(value, SupportsIndex) else 0
    except TypeError:  # an array or a tensor of several numbers, or of no integers
        number = 0
    if isinstance(value, bool) or number < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}")
    return number


def count_fields(settings: object, names: Sequence[str], *, optional: Sequence[str] = ()) -> None:
    """Let these fields of frozen settings be ints of 1 or more; the optional ones also None.

    Raises InputError, which names the first field that is not.
    """
    for name in (*names, *optional):
        value = getattr(settings, name)
        if value is not None or name in names:
            object.__setattr__(settings, name, counted(name, value))


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

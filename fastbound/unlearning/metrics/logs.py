"""TOFU's aggregated evaluation log: four sections of per-row losses and ROUGE, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastbound.errors import InputError
from fastbound.unlearning.data.files import parse_json, read_text
from fastbound.unlearning.metrics.open_unlearning import is_open_unlearning, log_of

Log = Mapping[str, Any]


def read_log(log: Log | str | Path) -> Log:
    """The log in a JSON file: TOFU's or MUSE's own, or open-unlearning's TOFU_EVAL.json.

    A mapping is treated as the contents of such a file.

    Raises:
        InputError: the file cannot be read, is not a JSON object, or is open-unlearning's summary.
    """
    if isinstance(log, Mapping):
        return log_of(log, "log") if is_open_unlearning(log) else log
    path = Path(log)
    if not path.is_file():
        raise InputError(
            f"log {log} cannot be read: it does not exist or is not a file; give TOFU's aggregated "
            "evaluation as JSON"
        )
    value = parse_json(
        read_text(path), f"log {log}", "give TOFU's aggregated evaluation", lines=True
    )
    if not isinstance(value, dict):
        raise InputError(f"log {log} holds {type(value).__name__}: a JSON object is needed")
    return log_of(value, f"log {log}") if is_open_unlearning(value) else value


def column(log: Log, section: str, field: str, name: str = "log") -> np.ndarray:
    """One field of one section, float64: `[rows]`, or `[rows, wrong answers]`.

    In the log it is a list in the order of the rows, or as in TOFU's a mapping from row number to
    value.

    Raises:
        InputError: section or field is missing, empty, ragged, not numeric, or not finite.
    """
    where = f"{name}, {section}, {field}"
    if section not in log:
        raise InputError(f"{name}: section {section!r} is missing; {_names(log)}")
    if not isinstance(log[section], Mapping) or field not in log[section]:
        raise InputError(f"{name}, {section}: field {field!r} is missing; {_names(log[section])}")
    value = log[section][field]
    if isinstance(value, Mapping):
        try:
            value = [value[key] for key in sorted(value, key=int)]
        except ValueError:
            raise InputError(f"{where}: its keys must be row numbers") from None
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{where}: needs one number per row, or the same number of them in every row"
        ) from None
    if values.ndim == 0:
        raise InputError(f"{where}: needs one number per row, got {value!r}")
    if values.size == 0:
        raise InputError(f"{where} holds no rows")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise InputError(
            f"{where}, row {row}: {values[row]} is not finite; the model that gave it has "
            "collapsed or was evaluated in too narrow a dtype"
        )
    return values


def losses(log: Log, section: str, name: str = "log") -> tuple[np.ndarray, np.ndarray]:
    """Losses of the right (paraphrased) answers `[rows]` and the wrong ones `[rows, wrong]`."""
    right = column(log, section, "avg_paraphrased_loss", name)
    wrong = column(log, section, "average_perturb_loss", name)
    check_lengths(name, section, avg_paraphrased_loss=right, average_perturb_loss=wrong)
    if right.ndim != 1 or wrong.ndim != 2:
        raise InputError(
            f"{name}, {section}: needs one avg_paraphrased_loss and a list of average_perturb_loss "
            f"per row, got shapes {right.shape} and {wrong.shape}"
        )
    return right, wrong


def check_lengths(name: str, section: str, **columns: np.ndarray) -> None:
    """Raise `InputError` if the fields of a section do not all have one value per row."""
    lengths = {field: len(values) for field, values in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise InputError(f"{name}, {section}: fields of different lengths ({found})")


def _names(value: object) -> str:
    if not isinstance(value, Mapping):
        return f"found {type(value).__name__}"
    return "found " + (", ".join(map(str, value)) or "nothing")

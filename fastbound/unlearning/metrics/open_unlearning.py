"""Reading open-unlearning's TOFU_EVAL.json and MUSE_EVAL.json as logs of TOFU and MUSE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastbound.errors import InputError
from fastbound.unlearning.metrics.sections import (
    FORGET,
    MEMBERSHIP,
    REAL_AUTHORS,
    RETAIN,
    WORLD_FACTS,
)

# Section -> the prefix of its metrics, and what its right answers are called.
_SECTIONS = {
    FORGET: ("forget", "Q_A_PARA_Prob"),
    RETAIN: ("retain", "Q_A_PARA_Prob"),
    REAL_AUTHORS: ("ra", "Q_A_Prob"),
    WORLD_FACTS: ("wf", "Q_A_Prob"),
}
_TRUTH_RATIO = "forget_truth_ratio"


def is_open_unlearning(value: Mapping[str, Any]) -> bool:
    """Whether this maps names to metrics of open-unlearning: `{"agg_value": ...}` or a number."""
    held = [value[name] for name in _names() if name in value]
    return any(not isinstance(each, Mapping) or "agg_value" in each for each in held)


def log_of(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same values in the layout of TOFU's aggregated log or of MUSE's log.

    These are, by section, ROUGE and the losses of answers, paraphrases and wrong answers; the truth
    ratios of the forget rows, if the file has no losses; and the scores per row of membership
    attacks. Metrics without rows are left out.

    Raises InputError for a file that has only aggregates (TOFU_SUMMARY.json).
    """
    log: dict[str, Any] = {}
    for section, (prefix, right) in _SECTIONS.items():
        fields = {
            "avg_gt_loss": _rows(value, f"{prefix}_Q_A_Prob", "avg_loss"),
            "avg_paraphrased_loss": _rows(value, f"{prefix}_{right}", "avg_loss"),
            "average_perturb_loss": _rows(value, f"{prefix}_Q_A_PERT_Prob", "avg_loss"),
            "rougeL_recall": _rows(value, f"{prefix}_Q_A_ROUGE", "rougeL_recall"),
        }
        if section == FORGET:
            fields["truth_ratio"] = _rows(value, _TRUTH_RATIO, "score")
        held = {name: rows for name, rows in fields.items() if rows is not None}
        if held:
            log[section] = held
    attacks = {}
    for name, each in value.items():
        if name.startswith("mia_") and isinstance(each, Mapping):
            sides = {side: _rows(each, side, "score") for side in ("forget", "holdout")}
            if all(rows is not None for rows in sides.values()):
                attacks[name] = sides
    if attacks:
        log[MEMBERSHIP] = attacks
        if "mia_min_k" in attacks:
            log["privleak"] = attacks["mia_min_k"]
    if not log:
        raise InputError(
            f"{where} has open-unlearning's aggregates without rows: give the TOFU_EVAL.json (or "
            "MUSE_EVAL.json) in the same folder as the summary"
        )
    return log


def _rows(value: Mapping[str, Any], metric: str, field: str) -> dict[str, Any] | None:
    """Row number -> one field, for a metric that has rows."""
    held = value.get(metric)
    rows = held.get("value_by_index") if isinstance(held, Mapping) else None
    if not isinstance(rows, Mapping) or not rows:
        return None
    found = {
        number: row.get(field) if isinstance(row, Mapping) else None for number, row in rows.items()
    }
    return None if all(each is None for each in found.values()) else found


def _names() -> Iterator[str]:
    yield from (_TRUTH_RATIO, "forget_quality", "model_utility", "privleak", "mia_min_k")
    for prefix, right in _SECTIONS.values():
        yield from (f"{prefix}_Q_A_Prob", f"{prefix}_{right}")

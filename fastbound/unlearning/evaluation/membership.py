"""Membership attacks: scores of forget and holdout rows by open-unlearning's names, and AUCs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastbound.errors import InputError, NonFiniteError, did_you_mean
from fastbound.unlearning import metrics
from fastbound.unlearning.data.encoding import IGNORED, Encoded, answer_length, collate
from fastbound.unlearning.evaluation.benchmark import Log
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.metrics.conventions import MUSE, OPEN_UNLEARNING
from fastbound.unlearning.metrics.logs import column
from fastbound.unlearning.metrics.sections import MEMBERSHIP
from fastbound.unlearning.metrics.tokens import vocabulary_log_probabilities
from fastbound.unlearning.model import adapter_of, forward

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "reference")
K = 0.4
SIDES = ("forget", "holdout")


def check_attacks(names: Sequence[str]) -> tuple[str, ...]:
    """The attacks in the order of `ATTACKS`, each once. Raises InputError for an unknown one."""
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise InputError(
            f"unknown membership attack {unknown[0]!r}: choose from {', '.join(ATTACKS)}"
            f"{did_you_mean(unknown[0], ATTACKS)}"
        )
    return tuple(name for name in ATTACKS if name in names)


def check_texts(rows: Sequence[Encoded]) -> None:
    """Raise InputError for a row with fewer than two labelled tokens: the last is not scored."""
    for row in rows:
        if answer_length(row) < 2:
            raise InputError(
                f"{row.where}: an answer of {answer_length(row)} token is too short for a "
                "membership attack: leave the row out, or use another --template"
            )


def score_sides(
    session: Session,
    sides: Mapping[str, Sequence[Encoded]],
    attacks: Sequence[str],
    convention: str,
) -> dict[str, dict[str, list[float]]]:
    """`mia_NAME` -> side -> one score per row, low for a row that the model knows."""
    found: dict[str, dict[str, list[float]]] = {f"mia_{name}": {} for name in attacks}
    for side, rows in sides.items():
        for name, scores in _scores(session, side, rows, attacks, convention).items():
            found[f"mia_{name}"][side] = scores
    return found


def _scores(
    session: Session,
    side: str,
    rows: Sequence[Encoded],
    attacks: Sequence[str],
    convention: str,
) -> dict[str, list[float]]:
    likelihoods = [name for name in attacks if name != "gradnorm"]
    found: dict[str, list[float]] = {}

    def compute(part: list[Encoded]) -> list[dict[str, float]]:
        return _of_likelihoods(session, part, likelihoods, convention)

    if likelihoods:
        each = session.each(f"membership {side}", rows, compute, length=lambda row: len(row.ids))
        found.update({name: [values[name] for values in each] for name in likelihoods})
    if "gradnorm" in attacks:
        found["gradnorm"] = session.each(
            f"membership gradnorm {side}",
            rows,
            lambda part: [_gradient_norm(session, row, convention) for row in part],
            length=lambda row: len(row.ids),
            batch_size=1,
        )
    return found


def _of_likelihoods(
    session: Session, rows: list[Encoded], attacks: Sequence[str], convention: str
) -> list[dict[str, float]]:
    scores, logits, labels = session.scored(rows)
    other = session.scored(rows, session.reference)[0] if "reference" in attacks else None
    found = []
    for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
        inner = score.without_end() if convention == OPEN_UNLEARNING else score
        values: dict[str, float] = {"loss": score.loss}
        if "zlib" in attacks:
            told = [label for label in row.labels if label != IGNORED]
            text = session.tokenizer.decode(told, skip_special_tokens=True)
            values["zlib"] = metrics.zlib_ratio(score.loss, text)
        if "min_k" in attacks:
            values["min_k"] = metrics.min_k(inner.log_probabilities, K, convention=convention)
        if "min_k_plus_plus" in attacks:
            one = slice(place, place + 1)  # one row, as the result is as large as its logits
            whole = vocabulary_log_probabilities(logits[one], labels[one])[0]
            values["min_k_plus_plus"] = metrics.min_k_plus_plus(
                inner.log_probabilities, whole[: len(inner.correct)].cpu(), K
            )
        if other is not None:
            values["reference"] = metrics.reference_difference(score.loss, other[place].loss)
        found.append({name: values[name] for name in attacks})
    return found


def _gradient_norm(session: Session, row: Encoded, convention: str) -> float:
    """The score for one row: from the gradient of its mean loss by all weights of the model."""
    model = session.model
    weights = [p for p in model.parameters() if p.is_floating_point()]
    trained = [p.requires_grad for p in weights]
    batch = collate([row], session.pad).to(model.device)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            loss = answer_tokens(
                forward(model, batch.input_ids, batch.attention_mask), batch.labels
            ).loss
            inner = loss[:-1] if convention == OPEN_UNLEARNING else loss
            gradients = torch.autograd.grad(inner.mean(), weights, allow_unused=True)
    finally:
        for weight, was in zip(weights, trained, strict=True):
            weight.requires_grad_(was)
    norms = torch.stack([g.float().norm() for g in gradients if g is not None])
    if not torch.isfinite(norms).all():
        raise NonFiniteError(f"{row.where}: the gradient is not finite: try --dtype float32")
    return metrics.gradient_norm(norms.cpu())


def check_gradients(model: nn.Module) -> None:
    """Raise InputError for a model whose weights have no gradient of their own."""
    kind = adapter_of(model)
    if kind is not None:
        raise InputError(
            f"membership attack gradnorm takes the gradient of all weights, and those under an "
            f"adapter of {kind} have none: merge it first (fastbound.unlearning.model.merged)"
        )


def summary_of(log: Log, retain: Log | None, convention: str) -> dict[str, Any]:
    """By `mia_NAME` the AUC, the retain model's AUC if its log has it, and PrivLeak for Min-K.

    Without a retain log, PrivLeak is relative to an AUC of 0.5.
    """
    attacks: dict[str, Any] = {}
    for name in log.get(MEMBERSHIP, {}):
        auc = _auc(log, name, "log", convention)
        held = None if retain is None else retain.get(MEMBERSHIP, {}).get(name)
        other = None if held is None else _auc(retain, name, "retain log", convention)
        attacks[name] = {"auc": auc, "retain_auc": other}
        if name == "mia_min_k":
            reference = 0.5 if other is None else other
            attacks[name]["privleak"] = metrics.privleak(auc, reference, convention=convention)
    return attacks


def _auc(log: Any, name: str, where: str, convention: str) -> float:
    sides = {side: column(log[MEMBERSHIP], name, side, where) for side in SIDES}
    for side, values in sides.items():
        if values.ndim != 1:
            raise InputError(f"{where}, {name}, {side}: needs one number per row, got lists")
    return metrics.membership_auc(**sides, convention=convention)


def lines_of(attacks: Mapping[str, Mapping[str, Any]], convention: str) -> list[str]:
    """The lines for a terminal."""
    if not attacks:
        return []
    known = 0 if convention == MUSE else 1
    lines = [f"membership AUC  {known} where every forget row is known, 0.5 where none can be told"]
    for name, each in attacks.items():
        line = f"  {name:20}{each['auc']:.4f}"
        if each["retain_auc"] is not None:
            line += f"   retain model {each['retain_auc']:.4f}"
        if "privleak" in each:
            against = "0.5" if each["retain_auc"] is None else "the retain model"
            line += f"   PrivLeak {each['privleak']:.2f} against {against}"
        lines.append(line)
    return lines

"""A weighted sum of losses over one batch: rows to forget, rows to retain, then refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastbound.errors import InputError, did_you_mean
from fastbound.unlearning.data.encoding import Batch
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.losses import formulas, hidden, logits
from fastbound.unlearning.losses.formulas import AnswerTokens, GradientDifference


class Answers(NamedTuple):
    """A model's output for a batch: the loss of each answer token, and what else losses need.

    Attributes:
        logits: `[rows, length, vocabulary]` if they were computed whole, otherwise None.
        hidden: `[rows, length, width]` of the layer that was asked for, otherwise None.
    """

    tokens: AnswerTokens
    logits: Tensor | None = None
    hidden: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Answers:
        """The answers computed from logits `[rows, length, vocabulary]`, which are kept."""
        return cls(formulas.answer_tokens(logits, labels), logits)


class _Scored:
    """A batch with the likelihoods of its rows, by side, now and before unlearning."""

    def __init__(
        self,
        batch: Batch,
        rows: tuple[int, ...],
        now: Answers,
        before: Answers | None,
        seed: int,
    ) -> None:
        self.batch = batch
        self.now = now
        self._before = before
        self.seed = seed
        self.forget = slice(0, rows[0])
        self.retain = slice(rows[0], rows[0] + rows[1])
        self.refused = slice(rows[0] + rows[1], None)

    @property
    def before(self) -> Answers:
        if self._before is None:
            raise ValueError("the answers of the unadapted model are missing: pass reference")
        return self._before

    @property
    def nll(self) -> Tensor:
        return self._likelihoods[0]

    @property
    def lengths(self) -> Tensor:
        return self._likelihoods[1]

    @property
    def forget_tokens(self) -> Tensor:
        """The loss of each token of the rows to forget."""
        return self.now.tokens.loss[self.now.tokens.row < self.forget.stop]

    @property
    def forget_labels(self) -> Tensor:
        return self.batch.labels[self.forget]

    @cached_property
    def _likelihoods(self) -> tuple[Tensor, Tensor]:
        return formulas.row_likelihoods(self.now.tokens, len(self.batch.labels))

    @cached_property
    def nll_before(self) -> Tensor:
        return formulas.row_likelihoods(self.before.tokens, len(self.batch.labels))[0]


def _npo(scored: _Scored, **options: Any) -> Tensor:
    return formulas.npo(scored.nll[scored.forget], scored.nll_before[scored.forget], **options)


def _simnpo(scored: _Scored, **options: Any) -> Tensor:
    return formulas.simnpo(scored.nll[scored.forget], scored.lengths[scored.forget], **options)


def _flooding(scored: _Scored, **options: Any) -> Tensor:
    return formulas.flooding(scored.nll[scored.forget], scored.lengths[scored.forget], **options)


def _dpo(scored: _Scored, **options: Any) -> Tensor:
    wanted, unwanted, before = scored.refused, scored.forget, scored.nll_before
    return formulas.dpo(
        scored.nll[wanted], before[wanted], scored.nll[unwanted], before[unwanted], **options
    )


def _wga(scored: _Scored, **options: Any) -> Tensor:
    return formulas.wga(scored.forget_tokens, **options)


def _satimp(scored: _Scored, **options: Any) -> Tensor:
    return formulas.satimp(scored.forget_tokens, **options)


def _ihl(scored: _Scored) -> Tensor:
    return logits.ihl(_whole(scored.now)[scored.forget], scored.forget_labels)


def _kl(scored: _Scored) -> Tensor:
    rows = scored.retain
    mask = scored.batch.attention_mask[rows]
    return logits.retain_kl(_whole(scored.now)[rows], _whole(scored.before)[rows], mask)


def _undial(scored: _Scored, **options: Any) -> Tensor:
    now, before = _whole(scored.now), _whole(scored.before)
    rows = scored.forget
    return logits.undial(now[rows], before[rows], scored.forget_labels, **options)


def _ceu(scored: _Scored, **options: Any) -> Tensor:
    return logits.ceu(_whole(scored.now)[scored.forget], scored.forget_labels, **options)


def _pdu(scored: _Scored, **options: Any) -> Tensor:
    return logits.pdu(_whole(scored.now)[scored.forget], scored.forget_labels)


def _rmu(scored: _Scored, layer: Any = None, **options: Any) -> Tensor:
    states = _hidden(scored.now)[scored.forget]
    target = hidden.control_vector(states.shape[-1], seed=scored.seed, **options)
    return hidden.rmu(states, target.to(states), scored.forget_labels)


def _rmu_retain(scored: _Scored, layer: Any = None) -> Tensor:
    now, before = (_hidden(each)[scored.retain] for each in (scored.now, scored.before))
    return hidden.rmu(now, before, scored.batch.labels[scored.retain])


def _whole(answers: Answers) -> Tensor:
    if answers.logits is None:
        names = " and ".join(name for name, loss in LOSSES.items() if loss.logits)
        raise ValueError(f"{names} need whole logits: pass Answers.of(logits, labels)")
    return answers.logits


def _hidden(answers: Answers) -> Tensor:
    if answers.hidden is None:
        raise ValueError("rmu and rmu_retain need hidden states: pass Answers(..., hidden=...)")
    return answers.hidden


@dataclass(frozen=True)
class Option:
    """A number that can be set for a loss.

    Attributes:
        default: for display; the formula has the same default.
        whole: whether it must be a whole number.
        zero: whether 0 is allowed.
    """

    default: float | str
    whole: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes:
        term: computes its value for a batch; None for the cross-entropies, which share one sum.
        options: the numbers that can be set, by name.
        reference: whether it also needs the unadapted model's answers.
        refusals: whether it needs "don't know" rows.
        logits: whether it needs whole logits; the others use the losses of answer tokens.
        hidden: whether it needs the hidden states of one layer.
    """

    term: Callable[..., Tensor] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    reference: bool = False
    refusals: bool = False
    logits: bool = False
    hidden: bool = False


_LAYER = {"layer": Option("a quarter of the way up", whole=True, zero=True)}
_DUAL = {"limit": Option("none"), "step": Option(1.0)}

LOSSES = {
    "gradient_ascent": Loss(),
    "retain": Loss(),
    "npo": Loss(_npo, {"beta": Option(0.1)}, reference=True),
    "simnpo": Loss(_simnpo, {"beta": Option(4.5), "delta": Option(0.0, zero=True)}),
    "flooding": Loss(_flooding, {"level": Option(2.5)}),
    "ihl": Loss(_ihl, logits=True),
    "kl": Loss(_kl, reference=True, logits=True),
    "idk": Loss(refusals=True),
    "dpo": Loss(_dpo, {"beta": Option(0.1)}, reference=True, refusals=True),
    "wga": Loss(_wga, {"beta": Option(1.0, zero=True)}),
    "satimp": Loss(_satimp, {"beta1": Option(5.0, zero=True), "beta2": Option(1.0, zero=True)}),
    "undial": Loss(_undial, {"beta": Option(10.0)}, reference=True, logits=True),
    "ceu": Loss(_ceu, {"skip": Option(1, whole=True, zero=True)}, logits=True),
    "pdu": Loss(_pdu, _DUAL, logits=True),
    "rmu": Loss(_rmu, {**_LAYER, "steering": Option(20.0)}, hidden=True),
    "rmu_retain": Loss(_rmu_retain, _LAYER, reference=True, hidden=True),
}

Weight = float | Mapping[str, float]

# The answers that refuse a row to forget, used in turn.
REFUSALS = (
    "I don't know.",
    "I'm not sure about that.",
    "I have no information about this.",
    "That is something I can't tell you.",
    "I don't have an answer to this question.",
    "I haven't learned anything about that topic.",
)


def check_losses(losses: Mapping[str, Weight]) -> dict[str, Weight]:
    """The checked losses, with the weights as floats.

    Args:
        losses: from each loss's name to its weight, or to `{"weight": 1.0, option: number}` with
            some of its `options` in `LOSSES`.

    Raises:
        InputError: a loss or an option is unknown, a number is out of range, all weights are 0, or
            two losses contradict each other.
    """
    if not losses:
        raise InputError(f"losses is empty: name at least one of {', '.join(LOSSES)}")
    checked: dict[str, Weight] = {}
    for name, given in losses.items():
        if name not in LOSSES:
            raise InputError(
                f"unknown loss {name!r}; choose from {', '.join(LOSSES)}"
                f"{did_you_mean(name, LOSSES)}"
            )
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = options.pop("weight", 1.0)
        if not (_is_number(weight) and weight >= 0):
            raise InputError(f"the weight of {name} must be >= 0 and finite, got {weight!r}")
        options = {key: _checked_option(name, key, value) for key, value in options.items()}
        checked[name] = {"weight": float(weight), **options} if options else float(weight)
    if not any(map(weight_of, checked.values())):
        raise InputError(f"every weight is 0 ({', '.join(losses)}): nothing would be learned")
    _check_together(checked)
    return checked


def weight_of(given: Weight) -> float:
    """The weight of a checked loss, whether or not it has options."""
    return given["weight"] if isinstance(given, Mapping) else given


def options_of(given: Weight) -> dict[str, float]:
    """The options of a checked loss."""
    if not isinstance(given, Mapping):
        return {}
    return {name: value for name, value in given.items() if name != "weight"}


def described(losses: Mapping[str, Weight]) -> str:
    """The losses for display: `1 rmu (layer 3) + 2 retain`."""
    parts = []
    for name, given in losses.items():
        options = ", ".join(f"{option} {value:g}" for option, value in options_of(given).items())
        parts.append(f"{weight_of(given):g} {name}" + (f" ({options})" if options else ""))
    return " + ".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked_option(loss: str, name: str, value: Any) -> float:
    known = LOSSES[loss].options
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"the loss {loss} has no option {name!r}: {has}")
    option = known[name]
    allowed = _is_number(value) and (value >= 0 if option.zero else value > 0)
    if not allowed or (option.whole and value != int(value)):
        kind = "a whole number" if option.whole else "finite and"
        least = ">= 0" if option.zero else "> 0"
        raise InputError(f"option {name} of the loss {loss} must be {kind} {least}, got {value!r}")
    return int(value) if option.whole else float(value)


def _check_together(checked: Mapping[str, Weight]) -> None:
    dual = options_of(checked.get("pdu", 0.0))
    if "step" in dual and "limit" not in dual:
        raise InputError(
            "option step of the loss pdu adjusts the weight of retain to hold the retain loss at "
            "limit: give limit as well"
        )
    if "limit" in dual and not weight_of(checked.get("retain", 0.0)):
        raise InputError(
            "option limit of the loss pdu adjusts the weight of the loss retain: give retain a "
            "weight"
        )
    layers = {name: options_of(checked.get(name, 0.0)).get("layer") for name in _HIDDEN}
    if all(name in checked for name in _HIDDEN) and len(set(layers.values())) > 1:
        raise InputError(
            "rmu and rmu_retain use the hidden states of one layer: give both the same option "
            f"layer, got {', '.join(map(str, layers.values()))}"
        )


_HIDDEN = tuple(name for name, loss in LOSSES.items() if loss.hidden)


def refusals(rows: Sequence[Row]) -> list[Row]:
    """Each question of `rows` with a refusal as its answer.

    Raises InputError for a row of plain text, which has no question.
    """
    for row in rows:
        if row.question is None:
            raise InputError(
                f"{row.where}: the losses idk and dpo need a question, but this row is a text"
            )
    return [
        Row(row.question, REFUSALS[i % len(REFUSALS)], f"{row.where} (refused)")
        for i, row in enumerate(rows)
    ]


class Objective:
    """`Σ weight · loss`, with the mean cross-entropies `forget` and `retain` for display.

    gradient_ascent is −CE(forget), in which no token counts for more than `ceiling`; retain is
    CE(retain), idk is CE(refusals). The others are functions of `fastbound.unlearning.losses`:
    means over the rows or tokens of a batch.

    With the option `limit` of pdu the weight λ of retain is a Lagrange multiplier: after each step
    λ ← max(0, λ + step · (CE(retain) − limit)).

    Args:
        losses: as for `check_losses`.
        seed: of RMU's control vector.
        ceiling: in nats; None lets gradient ascent push every token without end.

    Raises InputError as `check_losses` does.
    """

    def __init__(
        self, losses: Mapping[str, Weight], seed: int = 0, *, ceiling: float | None = None
    ) -> None:
        checked = check_losses(losses)
        self.weights = {name: weight_of(given) for name, given in checked.items()}
        self.options = {name: options_of(given) for name, given in checked.items()}
        self.seed = seed
        self.ceiling = ceiling if "gradient_ascent" in self.weights else None
        self.needs_reference = any(LOSSES[name].reference for name in self.weights)
        self.needs_refusals = any(LOSSES[name].refusals for name in self.weights)
        self.whole_logits = [name for name in self.weights if LOSSES[name].logits]
        self.needs_hidden = any(LOSSES[name].hidden for name in self.weights)

    def layer(self, model: nn.Module) -> nn.Module | None:
        """The layer of `model` whose hidden states are used, or None. Raises InputError."""
        if not self.needs_hidden:
            return None
        index = next((o["layer"] for o in self.options.values() if "layer" in o), None)
        return hidden.layer_at(model, None if index is None else int(index))

    def after_step(self, retain: float) -> None:
        """Update the multiplier of pdu, if there is one, by the retain loss of a whole step."""
        dual = self.options.get("pdu", {})
        if "limit" in dual:
            moved = self.weights["retain"] + dual.get("step", 1.0) * (retain - dual["limit"])
            self.weights["retain"] = max(0.0, moved)

    def state(self) -> dict[str, float]:
        """What has changed since the start, for a checkpoint and for the log."""
        moving = "limit" in self.options.get("pdu", {})
        return {"retain_weight": self.weights["retain"]} if moving else {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore a `state`."""
        if "retain_weight" in state:
            self.weights["retain"] = state["retain_weight"]

    def __call__(
        self,
        answers: Answers,
        batch: Batch,
        rows: tuple[int, ...],
        *,
        reference: Answers | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
        part: float = 1.0,
    ) -> GradientDifference:
        """The loss of a batch.

        Args:
            answers: of the model being trained; with logits if `whole_logits` names a loss, and
                with hidden states of `layer` if `needs_hidden`.
            batch: the batch from which they were computed.
            rows: number of rows to forget, to retain and, if needed, of refusals.
            reference: answers of the unadapted model, if a loss needs them.
            shares: factors of the cross-entropies of forget and retain, see `shares`.
            part: factor of all other losses: 1 / the number of batches per step.

        Raises:
            ValueError: reference, logits, hidden states or refusals are missing, or `rows` are not
                those of the batch.
        """
        needed = 2 + self.needs_refusals  # refusals that no loss needs may be there
        if not needed <= len(rows) <= 3 or sum(rows) != len(batch.labels):
            expected = "forget, retain and refusals" if self.needs_refusals else "forget and retain"
            raise ValueError(
                f"rows must be the numbers of rows of {expected}, {len(batch.labels)} together, "
                f"got {rows}"
            )
        weight = self.weights.get
        signed = (
            -weight("gradient_ascent", 0.0) * shares[0],
            weight("retain", 0.0) * shares[1],
            weight("idk", 0.0) * part,
        )
        difference = formulas.weighted_cross_entropy(
            answers.tokens, rows, signed[: len(rows)], self.ceiling
        )
        total = difference.loss
        scored = _Scored(batch, rows, answers, reference, self.seed)
        for name, factor in self.weights.items():
            term = LOSSES[name].term
            if term is not None:
                total = total + factor * part * term(scored, **self.options[name])
        return difference._replace(loss=total)

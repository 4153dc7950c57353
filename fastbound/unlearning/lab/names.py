"""The names of the adapters that the map compares, such as `sine@0.5*spectral+attention+ranks`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fastbound.errors import InputError, did_you_mean, positive
from fastbound.layers.bounds import bound_of_weight, weight_bound
from fastbound.unlearning.losses.objective import LOSSES, Weight, check_losses

KINDS = ("lora", "lora-clamp", "lora-clip", "lora-decay", "sine", "tanh", "product")
BOUNDED = ("sine", "tanh", "product")
MODULES = ("mlp", "attention")
FORGET_LOSSES = tuple(
    name
    for name, loss in LOSSES.items()
    if loss.term is not None and not (loss.reference or loss.refusals or loss.hidden)
)
OPTIONS = (*MODULES, *FORGET_LOSSES, "ceiling", "fila", "stop", "ranks")  # in the order of a name
_LABELS = {
    "lora": "LoRA",
    "lora-clamp": "LoRA, factors clamped",
    "lora-clip": "LoRA, gradient clipped",
    "lora-decay": "LoRA, weight decay",
    "sine": "bounded",
    "tanh": "tanh",
    "product": "product form",
}
_OF_OPTIONS = {
    "ceiling": "ascent with a ceiling",
    "fila": "FILA's start",
    "stop": "stops when forgotten",
    "ranks": "ranks spread",
}
_OMEGA = "omega="


@dataclass(frozen=True)
class Adapter:
    """One adapter of the grid.

    Attributes:
        base: as it was asked for, without options: `kind`, `kind@alpha`, `kind@BOUND` or
            `product@omega=X`.
        kind: one of `KINDS`.
        bound: in units of the layer's weight, as "0.5*spectral"; None means bound = alpha for a
            bounded kind, and no bound for the others.
        omega: of `product@omega=X`, which is sin(X·B A): bound 1, alpha X·rank.
        options: some of `OPTIONS`, in their order; without "mlp" where only the MLPs are adapted.
        settings: numbers of the forget loss, as ("level", 2.7) of flooding.
    """

    base: str
    kind: str
    bound: str | None = None
    omega: float | None = None
    options: tuple[str, ...] = ()
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """The same for every way to write this adapter's options."""
        set_to = "".join(f"@{name}={value:.12g}" for name, value in self.settings)
        named = [each + set_to * (each in FORGET_LOSSES) for each in self.options]
        return "+".join([self.base, *named])

    @property
    def bounded(self) -> bool:
        return self.kind in BOUNDED

    @property
    def modules(self) -> tuple[str, ...]:
        """Which of `MODULES` it is put on."""
        return self._chosen(MODULES) or MODULES[:1]

    @property
    def losses(self) -> dict[str, Weight]:
        """What is minimised: gradient difference, or another forget loss in its place."""
        forget = self._chosen(FORGET_LOSSES) or ("gradient_ascent",)
        return _losses(forget[0], self.settings)

    @property
    def capped(self) -> bool:
        """Whether gradient ascent pushes a token no further than `fastbound unlearn` does."""
        return "ceiling" in self.options

    @property
    def starts_from_weight(self) -> bool:
        """Whether the factors start as those of FILA, see `fastbound.unlearning.training.fila`."""
        return "fila" in self.options

    @property
    def stops(self) -> bool:
        """Whether the run ends once the rows are forgotten and the others kept."""
        return "stop" in self.options

    @property
    def adaptive(self) -> bool:
        """The same parameters, with ranks as `fastbound.models.ranks` spreads them."""
        return "ranks" in self.options

    @property
    def label(self) -> str:
        """For a picture: what it is and how it is bounded, in words, without its options."""
        if self.omega is not None:
            return f"{_LABELS[self.kind]}, ω = {self.omega:g}"
        return _LABELS[self.kind] + (f", {self.bound or 'alpha'}" if self.bounded else "")

    @property
    def remarks(self) -> tuple[str, ...]:
        """For a picture: its options, in words."""
        where = () if self.modules == MODULES[:1] else (" and ".join(self.modules),)
        rest = (_OF_OPTIONS.get(each, each) for each in self.options if each not in MODULES)
        return (*where, *rest, *(f"{name} {value:g}" for name, value in self.settings))

    def bound_in(self, weight: Tensor, alpha: float) -> float:
        """The bound in this layer; infinite if the kind has none."""
        if not self.bounded:
            return math.inf
        if self.omega is not None:
            return 1.0
        return alpha if self.bound is None else bound_of_weight(self.bound, weight)

    def _chosen(self, among: Sequence[str]) -> tuple[str, ...]:
        return tuple(each for each in self.options if each in among)


def parse_adapter(text: str) -> Adapter:
    """`lora` and its kin, or `sine`, `tanh`, `product` with `@alpha`, `@BOUND` or `@omega=X`.

    BOUND is a multiple such as `0.5*spectral`; a number alone is a multiple of RMS(W). X is the
    paper's frequency of `product` under its bound of 1. Options follow in any order, each after a
    `+`:

    - `attention`: on the attention projections in place of the MLPs, with `mlp` beside them
    - one of `FORGET_LOSSES`: that loss in place of gradient ascent, with numbers for its options
      (docs/losses.md) as in `flooding@level=2.7`
    - `ceiling`: gradient ascent pushes a token no further than in `fastbound unlearn`
    - `fila`: for LoRA, the factors start as LoKU's do, see `fastbound.unlearning.training.fila`
    - `stop`: the run ends as that of `fastbound unlearn` does, see `Ending`
    - `ranks`: the same number of parameters, spread over the layers by gradients

    Raises:
        InputError: an unknown kind or option, options that exclude one another, a bound where there
            is none, or none where there must be one.
    """
    base, *given = re.split(r"\+(?!\d)", text)  # a number may be written as 1e+2
    options, settings = _options(text, given)
    kind, at, bound = base.partition("@")
    if kind not in KINDS:
        raise InputError(
            f"unknown adapter {text!r}; choose from {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    if "fila" in options and (kind in BOUNDED or kind == "lora-clamp"):
        raise InputError(
            f"adapter {text!r}: +fila starts with a part of W in the factors, which {kind} would "
            "not hold: give it to lora, lora-clip or lora-decay"
        )
    if kind not in BOUNDED and at:
        raise InputError(f"adapter {text!r}: {kind} has no bound, drop @{bound}")
    adapter = partial(Adapter, base, kind, options=options, settings=settings)
    if kind not in BOUNDED or bound == "alpha":
        return adapter()
    if bound.startswith(_OMEGA) and kind == "product":
        return adapter(omega=_frequency(text, bound))
    bound = bound if "*" in bound else f"{bound}*rms"
    try:
        weight_bound(bound)
    except ValueError as error:
        raise InputError(
            f"adapter {text!r}: give {kind}@alpha, or {kind}@BOUND with a positive multiple "
            "such as 0.5*spectral, or a number for so many RMS(W)"
        ) from error
    return adapter(bound=bound)


def _losses(forget: str, settings: Iterable[tuple[str, float]]) -> dict[str, Weight]:
    """This forget loss with its settings, and as much of the loss on the rows to keep."""
    return check_losses({forget: {"weight": 1.0, **dict(settings)}, "retain": 1.0})


def _options(
    text: str, given: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, float], ...]]:
    """The options in the order of `OPTIONS`, and the settings of the loss among them."""
    names = [each.partition("@")[0] for each in given]
    settings: list[tuple[str, float]] = []
    for option, *numbers in [each.split("@") for each in given]:
        if option in LOSSES and option not in FORGET_LOSSES:
            raise InputError(
                f"adapter {text!r}: {_why_not(option)}; the losses to choose from are "
                f"{', '.join(FORGET_LOSSES)}"
            )
        if option not in OPTIONS:
            raise InputError(
                f"adapter {text!r}: unknown option {option!r}; choose from {', '.join(OPTIONS)}"
                f"{did_you_mean(option, OPTIONS)}"
            )
        if names.count(option) > 1:
            raise InputError(f"adapter {text!r} names +{option} twice: give it once")
        if numbers:
            settings += _settings(text, option, numbers)
    losses = [each for each in names if each in FORGET_LOSSES]
    if len(losses) > 1:
        raise InputError(f"adapter {text!r}: {' and '.join(losses)} exclude one another: give one")
    if losses and "ceiling" in names:
        raise InputError(
            f"adapter {text!r}: the ceiling is one of gradient ascent, which {losses[0]} replaces: "
            "drop one"
        )
    chosen = tuple(each for each in OPTIONS if each in names)
    if "attention" not in chosen:
        chosen = tuple(each for each in chosen if each != "mlp")
    return chosen, tuple(settings)


def _settings(text: str, option: str, numbers: Sequence[str]) -> list[tuple[str, float]]:
    """What follows each @ of a loss, as in `flooding@level=2.7`, in alphabetical order."""
    if option not in FORGET_LOSSES:
        raise InputError(f"adapter {text!r}: +{option} has no numbers, drop @{numbers[0]}")
    found: dict[str, float] = {}
    for name, _, value in (each.partition("=") for each in numbers):
        try:
            number = float(value)
        except ValueError:
            raise InputError(
                f"adapter {text!r}: give a number of {option} as @NAME=NUMBER, such as "
                "flooding@level=2.7"
            ) from None
        if name in found:
            raise InputError(f"adapter {text!r} sets {name} twice: give it once")
        found[name] = number
    try:
        _losses(option, found.items())
    except InputError as error:
        raise InputError(f"adapter {text!r}: {error}") from None
    return sorted(found.items())


def _why_not(loss: str) -> str:
    """Why a run of the lab cannot have this loss in place of gradient ascent."""
    needs = LOSSES[loss]
    if needs.term is None and not needs.refusals:
        return f"the loss {loss} is part of gradient difference, which is minimised anyway"
    lacking = {
        "the answers of the model before unlearning": needs.reference,
        'rows of "I don\'t know"': needs.refusals,
        "hidden states": needs.hidden,
    }
    return (
        f"the loss {loss} needs {' and '.join(each for each, needed in lacking.items() if needed)},"
        " and the lab has only the logits of the model in training"
    )


def _frequency(text: str, bound: str) -> float:
    try:
        return positive("omega", float(bound.removeprefix(_OMEGA)))
    except ValueError as error:
        raise InputError(
            f"adapter {text!r}: give product@omega=X with a positive X, such as product@omega=100"
        ) from error

"""When a run may end, and which of its evaluations it keeps the adapter of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.losses.objective import LOSSES, options_of, weight_of
from fastbound.unlearning.training.result import Evaluation

HEADROOM = 2.0  # the ceiling over the target, so that the mean over tokens reaches the target
SETTLED = 0.75  # of the level of flooding, around which the loss swings, counts as forgotten


class ForgottenWarning(UserWarning):
    """The rows to forget count as forgotten before the first step."""


class Ending:
    """When one run ends.

    The rows are *forgotten* once their loss reaches `target`, by default the loss of a uniform
    guess, ln V: a higher loss is damage to the model, not more forgetting. With the loss flooding
    it is three quarters of the level to which that brings the rows. Retention first falls
    and recovers as training goes on, so the run ends when the rows are forgotten **and** the retain
    loss is within `retain_slack` of where it began.
    """

    def __init__(self, config: UnlearnConfig, model: nn.Module, steps: int) -> None:
        self.config = config
        self.target = forget_target(config, model)
        self.steps = steps

    def check_start(self, before: Evaluation) -> None:
        """Warn where the run would end with nothing to do: the model does not know the rows."""
        if self.config.early_stop and before.forget.loss >= self.target:
            warnings.warn(
                f"the rows to forget have a loss of {before.forget.loss:.4g} nats per token before "
                f"unlearning, and count as forgotten from {self.target:.4g} on: the model does not "
                "know them, or forget_target (with the loss flooding, its level) must be higher",
                ForgottenWarning,
                stacklevel=2,
            )

    def forgotten(self, evaluation: Evaluation) -> bool:
        return evaluation.step > 0 and evaluation.forget.loss >= self.target

    def reason(self, history: Sequence[Evaluation], step: int) -> str | None:
        """Why the run ends after `step`, or None if it goes on."""
        first, last = history[0], history[-1]
        if last.step == step:
            kept = last.retain.loss <= first.retain.loss + self.config.retain_slack
            if self.config.early_stop and kept and self.forgotten(last):
                return "forget_target"
            limit = self.config.retain_limit
            if limit is not None and last.retain.loss > limit:
                return "retain_limit"
        return "all steps" if step >= self.steps else None

    def best(self, history: Sequence[Evaluation]) -> Evaluation:
        """Of those that have forgotten, the one with the lowest retain loss; else the last."""
        forgotten = [each for each in history if self.forgotten(each)]
        return min(forgotten, key=lambda each: each.retain.loss, default=history[-1])


def forget_target(config: UnlearnConfig, model: nn.Module) -> float:
    """The forget loss that counts as forgotten, in nats per token. Raises as `uniform_loss`."""
    if config.forget_target is not None:
        return config.forget_target
    flooding = config.weighted_losses.get("flooding", 0.0)
    if weight_of(flooding) > 0:
        default = float(LOSSES["flooding"].options["level"].default)
        return SETTLED * options_of(flooding).get("level", default)
    return uniform_loss(model)


def forget_ceiling(config: UnlearnConfig, model: nn.Module) -> float | None:
    """The loss beyond which a forget token is not pushed, in nats; None if there is no limit.

    Raises InputError for one below the target, under which no row would count as forgotten, and as
    `uniform_loss`.
    """
    given, target = config.forget_ceiling, forget_target(config, model)
    if given == "none":
        return None
    ceiling = HEADROOM * target if given == "auto" else float(given)
    if ceiling < target:
        raise InputError(
            f"forget_ceiling {ceiling:g} is below the forget_target of {target:.4g} nats per token,"
            " which the rows could then not reach: give a higher ceiling or a lower target"
        )
    return ceiling


def uniform_loss(model: nn.Module) -> float:
    """ln V in nats per token: the loss of a model that takes every token to be equally likely.

    Raises InputError for a model whose config does not give the size of its vocabulary.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    if not size:
        raise InputError(
            f"{type(model).__name__} has no config.vocab_size, from which the default "
            "forget_target (the loss of a uniform guess) is computed: give forget_target a number"
        )
    return math.log(size)

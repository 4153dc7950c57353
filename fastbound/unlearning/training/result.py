"""What a gradient-difference run returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fastbound.models.ranks import RankAllocation
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.losses.cross_entropy import CrossEntropy
from fastbound.unlearning.metrics.answers import Score


@dataclass(frozen=True)
class Evaluation:
    """The scores of both sides after `step` steps."""

    step: int
    forget: Score
    retain: Score


@dataclass(frozen=True)
class UnlearnResult:
    """What a run did. The model that it was given now carries the trained adapter.

    Attributes:
        model: the adapted model (for LoRA, PEFT's wrapper around the one given).
        disabled: inside `with result.disabled():` the model computes what it did before the run.
        history: every evaluation, from the one before the first step to the one after the last.
        kept: the step of the evaluation whose adapter is kept, see `UnlearnConfig.early_stop`.
        forget_target: the forget loss that counts as forgotten, nats per token.
        forget_ceiling: the loss up to which gradient ascent pushed a token, in nats; None if it had
            no end, or was not part of what was minimised.
        cross_entropy: whether the losses came from whole logits or in chunks, and why.
        skipped: name -> reason, for layers that match `target_modules` but cannot be adapted.
        ranks: what `rank="auto"` chose and why; None if the rank was given.
        stopped: why the run ended: "all steps", "forget_target" or "retain_limit".
        lr: the highest learning rate of any layer.
        largest_delta, bound: the largest |ΔW_ij| at the end and the bound of its layer (None for
            LoRA).
        bound_in_use: the root mean square of ΔW divided by the bound, averaged over the layers.
            Near 0 the bound does not act and the adapter behaves like LoRA. None for LoRA.
        seconds_per_step: median, without evaluations; None if this process took no step.
        peak_memory: in bytes. `peak_memory_kind` says of what: "device memory" that was allocated
            during the steps on CUDA, or elsewhere the "resident set" of the whole process so far.
    """

    model: nn.Module
    disabled: Callable[[], AbstractContextManager[object]]
    config: UnlearnConfig
    history: tuple[Evaluation, ...]
    cross_entropy: CrossEntropy
    skipped: Mapping[str, str]
    ranks: RankAllocation | None
    stopped: str
    kept: int
    forget_target: float
    forget_ceiling: float | None
    lr: float
    largest_delta: float
    bound: float | None
    bound_in_use: float | None
    seconds_per_step: float | None
    peak_memory: int
    peak_memory_kind: str

    @property
    def before(self) -> Evaluation:
        return self.history[0]

    @property
    def after(self) -> Evaluation:
        """The evaluation whose adapter is kept."""
        return next(each for each in self.history if each.step == self.kept)

    def as_dict(self) -> dict[str, Any]:
        """Everything except the model and `disabled`, as JSON values."""
        return {
            "config": self.config.as_dict(),
            "history": [asdict(each) for each in self.history],
            "cross_entropy": self.cross_entropy.as_dict(),
            "skipped": dict(self.skipped),
            "ranks": None if self.ranks is None else asdict(self.ranks),
            "stopped": self.stopped,
            "kept": self.kept,
            "forget_target": self.forget_target,
            "forget_ceiling": self.forget_ceiling,
            "lr": self.lr,
            "largest_delta": self.largest_delta,
            "bound": self.bound,
            "bound_in_use": self.bound_in_use,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory": self.peak_memory,
            "peak_memory_kind": self.peak_memory_kind,
        }

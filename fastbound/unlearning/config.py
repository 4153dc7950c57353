"""The settings of a gradient-difference run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastbound.errors import InputError, count_fields, one_of, positive
from fastbound.layers.bounds import weight_bound
from fastbound.truth.formula import ADAPTER_FORMS
from fastbound.unlearning.data.encoding import TEMPLATE, check_template
from fastbound.unlearning.losses.objective import Objective, Weight, check_losses

ADAPTERS: tuple[Literal["bounded", "lora"], ...] = ("bounded", "lora")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
LORA_STARTS = ("zero", "fila")
EVAL_STEPS = 5  # a few rows make an epoch of one step, and an evaluation costs many steps
SAMPLE_ROWS = 64  # of each side, for rank="auto" and lora_start="fila"
CROSS_ENTROPIES = ("auto", "chunked", "liger", "whole")


@dataclass(frozen=True)
class UnlearnConfig:
    """Settings of one run; whatever is out of range raises `InputError` at once.

    Attributes:
        adapter: "bounded" (`fastbound.inject`) or "lora" (PEFT's LoRA on the same layers, with the
            same rank and slope alpha / rank).
        rank, alpha, bound, form, omega, target_modules: as in `fastbound.inject`; `bound`, `form`
            and `omega` apply to "bounded" only.
            `rank="auto"` distributes `rank_budget` by the gradients of the cross-entropies of up to
            `SAMPLE_ROWS` rows per side, for both adapters.
        lora_start: where the factors of "lora" start. "zero": B = 0. "fila": the part of W that
            matters most to the rows to forget and least to those to keep, by the squared gradients
            of up to `SAMPLE_ROWS` rows per side, see `fastbound.unlearning.training.fila`. ΔW
            starts at 0 either way.
        rank_budget: the most elements of all A and B for `rank="auto"`; None allows as many as rank
            8 takes.
        lr: highest learning rate of AdamW, reached after warm-up. "auto" gives each layer the rate
            that its bound calls for (`fastbound.parameter_groups`), and LoRA 3e-3.
        warmup: share of all steps in which the rate rises from 0; it then falls linearly to 0.
        weight_decay: of A and B; 0 by default, as it pulls ΔW back to the model that still knows.
        clip: largest norm of the gradient over all A and B; None does not clip.
        epochs: passes over the forget rows.
        batch_size: pairs of one forget and one retain row per forward pass of one process.
        accumulation: forward passes per step. The loss of a step is the mean over all its answer
            tokens, however many passes and processes they are spread over.
        forget_weight, retain_weight: weights of the two cross-entropies, see `gradient_difference`.
        forget_ceiling: the loss, in nats, up to which gradient ascent pushes a token of a forget
            row; beyond it the token has no gradient. "auto" takes twice `forget_target`, and
            "none" pushes without end.
        losses: name -> weight, to minimise a sum other than gradient difference; a loss with
            options is name -> `{"weight": 1.0, "beta": 0.2}`. Names and options are those of
            `fastbound.unlearning.losses.objective.LOSSES`; docs/losses.md has the formulas. None
            means `{"gradient_ascent": forget_weight, "retain": retain_weight}`.
        max_length: the most tokens per row; a longer row is an error.
        template: see `fastbound.unlearning.encode`.
        seed: seed of A's initial values, the order of the rows, and dropout.
        device: "auto" takes the accelerator that `accelerate` finds.
        dtype: "bfloat16" runs the forward pass under autocast; A, B and the loss stay fp32.
        cross_entropy: "whole" forms all logits of a batch at once, "chunked" those of 256 answer
            tokens at a time, and "liger" does the same with liger-kernel on a GPU. If all logits
            would take more than 256 MiB, and model and losses allow it, "auto" takes "liger", or
            "chunked" without it. See `fastbound.unlearning.losses.cross_entropy`; the result holds
            the choice and the reason.
        shard: spread the frozen weights over the processes (`fastbound.shard`) instead of keeping a
            copy in each; needs several processes and the bounded adapter.
        gradient_checkpointing: recompute activations in the backward pass (non-reentrant).
        eval_every: steps between evaluations; None evaluates once per epoch, at intervals of at
            least `EVAL_STEPS` steps. The model is always evaluated before the first step and after
            the last.
        eval_rows: the most rows per side in an evaluation, spread evenly; None takes all.
        log_every: steps between log lines that hold the largest |ΔW|; every step has a line with
            its losses.
        checkpoint_every: steps between checkpoints; None writes one with every evaluation.
        early_stop: end once the rows are forgotten and the others kept: the evaluated forget loss
            has reached `forget_target`, and the retain loss is at most `retain_slack` above where
            it began. In any case the adapter of the best evaluation is kept: the one with the
            lowest retain loss among those that have reached the target, or the last if none has.
        forget_target: in nats per token; None takes the loss of a uniform guess, the logarithm of
            the vocabulary's size, or with the loss flooding three quarters of its level.
        retain_slack: in nats per token.
        retain_limit: give up once the evaluated retain loss exceeds this, in nats per token.
    """

    adapter: Literal["bounded", "lora"] = "bounded"
    rank: int | Literal["auto"] = 8
    lora_start: Literal["zero", "fila"] = "zero"
    rank_budget: int | None = None
    alpha: float | None = None
    bound: float | str | None = "auto"
    form: Literal["factors", "product"] = "factors"
    omega: float | None = None
    target_modules: str | Sequence[str] = "mlp"
    lr: float | Literal["auto"] = "auto"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float | None = None
    epochs: float = 10.0
    batch_size: int = 8
    accumulation: int = 1
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    forget_ceiling: float | Literal["auto", "none"] = "auto"
    losses: Mapping[str, Weight] | None = None
    max_length: int = 256
    template: str = TEMPLATE
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cross_entropy: Literal["auto", "chunked", "liger", "whole"] = "auto"
    shard: bool = False
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    eval_rows: int | None = 400
    log_every: int = 10
    checkpoint_every: int | None = None
    early_stop: bool = True
    forget_target: float | None = None
    retain_slack: float = 0.1
    retain_limit: float | None = None

    def __post_init__(self) -> None:
        one_of("adapter", self.adapter, ADAPTERS)
        one_of("device", self.device, DEVICES)
        one_of("dtype", self.dtype, DTYPES)
        one_of("cross_entropy", self.cross_entropy, CROSS_ENTROPIES)
        one_of("form", self.form, ADAPTER_FORMS)
        one_of("lora_start", self.lora_start, LORA_STARTS)
        if self.lora_start == "fila" and self.adapter != "lora":
            raise InputError(
                'lora_start "fila" puts a part of W into the factors, which the sines of the '
                f'adapter "{self.adapter}" cannot hold: give adapter "lora", or leave it out'
            )
        if self.adapter == "lora" and (self.form != "factors" or self.omega is not None):
            name, value = ("omega", self.omega) if self.omega is not None else ("form", self.form)
            raise InputError(f"{name} belongs to the bounded adapter, LoRA has none; got {value!r}")
        if self.omega is not None and self.alpha is not None:
            raise InputError(
                f"alpha={self.alpha!r} and omega={self.omega!r} set the same thing: give one"
            )
        if self.rank != "auto":
            count_fields(self, ["rank"])
            if self.rank_budget is not None:
                raise InputError(f'rank_budget is for rank "auto", and rank is {self.rank!r}')
        count_fields(
            self,
            ("batch_size", "accumulation", "max_length", "log_every"),
            optional=("rank_budget", "eval_every", "eval_rows", "checkpoint_every"),
        )
        positive("epochs", self.epochs)
        if self.lr != "auto":
            positive('lr, unless "auto",', self.lr)
        if self.forget_ceiling not in ("auto", "none"):
            positive('forget_ceiling, unless "auto" or "none",', self.forget_ceiling)
        for name in ("alpha", "omega", "clip", "forget_target", "retain_limit"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.forget_ceiling not in ("auto", "none") and (
            "gradient_ascent" not in self.weighted_losses
        ):
            raise InputError(
                f"forget_ceiling {self.forget_ceiling:g} limits gradient ascent, which is not one "
                f"of the losses {', '.join(self.weighted_losses)}: leave it out"
            )
        if isinstance(self.bound, str):
            try:
                weight_bound(self.bound)
            except ValueError as error:
                raise InputError(str(error)) from error
        elif self.bound is not None:
            positive("bound", self.bound)
        for name in ("weight_decay", "forget_weight", "retain_weight", "retain_slack"):
            value = getattr(self, name)
            if not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise InputError(f"{name} must be >= 0 and finite, got {value!r}")
        if self.losses is not None:
            if not isinstance(self.losses, Mapping):
                raise InputError(f"losses must be a dict of names and weights, got {self.losses!r}")
            object.__setattr__(self, "losses", check_losses(self.losses))
            if (self.forget_weight, self.retain_weight) != (1.0, 1.0):
                raise InputError(
                    "give weights in losses, or as forget_weight and retain_weight, not both"
                )
        if not any(self.weighted_losses.values()):
            raise InputError(
                f"every weight is 0 ({', '.join(self.weighted_losses)}), so that nothing would be "
                "trained: give one that is positive"
            )
        if self.cross_entropy in ("chunked", "liger"):
            taking = Objective(self.weighted_losses).whole_logits
            if taking:
                raise InputError(
                    f'cross_entropy "{self.cross_entropy}" never forms all logits at once, which '
                    f'{" and ".join(taking)} need: use "auto" or "whole"'
                )
        if not (_is_number(self.warmup) and 0 <= self.warmup <= 1):
            raise InputError(
                f"warmup is a share of all steps and must lie between 0 and 1, got {self.warmup!r}"
            )
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not (whole and 0 <= self.seed < 2**32):
            raise InputError(
                f"seed must lie between 0 and 2**32 - 1, as an integer, got {self.seed!r}"
            )
        for name in ("early_stop", "shard", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("epochs", "lr", "forget_ceiling", "alpha", "omega", "bound", "clip",
                     "forget_target", "retain_limit"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int | float | str | None):  # numpy's, not for JSON
                object.__setattr__(self, name, float(value))
        if not isinstance(self.target_modules, str):
            named = isinstance(self.target_modules, Iterable)
            targets = tuple(self.target_modules) if named else ()
            if not targets or not all(isinstance(each, str) for each in targets):
                raise InputError(
                    "target_modules must be a name, a regular expression or a list of names, got "
                    f"{self.target_modules!r}"
                )
            object.__setattr__(self, "target_modules", targets)
        if not isinstance(self.template, str):
            raise InputError(f"template must be text, got {self.template!r}")
        check_template(self.template)

    def evaluation_interval(self, epoch: int) -> int:
        """Steps between two evaluations, where an epoch has so many steps."""
        return self.eval_every or max(epoch, EVAL_STEPS)

    @property
    def weighted_losses(self) -> dict[str, Weight]:
        """What is minimised, by name with its weight."""
        if self.losses is not None:
            return dict(self.losses)
        return {"gradient_ascent": self.forget_weight, "retain": self.retain_weight}

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, just as JSON returns them."""
        values = dataclasses.asdict(self)
        if not isinstance(self.target_modules, str):
            values["target_modules"] = list(self.target_modules)
        return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

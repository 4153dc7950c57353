"""What a step changes, and how: the adapted model, its gradients, AdamW and its learning rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fastbound.errors import InputError
from fastbound.operator.partition import like, whole
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Batch, collate
from fastbound.unlearning.data.sampling import Pairing
from fastbound.unlearning.losses.cross_entropy import choose_cross_entropy
from fastbound.unlearning.losses.objective import Answers, Objective
from fastbound.unlearning.model import autocast, autocast_dtype
from fastbound.unlearning.training.adapters import Adapter
from fastbound.unlearning.training.processes import gradients_travel, shares, spread
from fastbound.unlearning.training.sides import Sides


class StepLosses(NamedTuple):
    """Means over all answer tokens of a step, in nats per token, and the norm before clipping."""

    forget: float
    retain: float
    grad_norm: float


class Training:
    """What a run trains: a step is `gradients` followed by `update`.

    Args:
        adapter: an adapted model, of which this process takes its part.
        objective: what is minimised over the batches that `pairing` draws from `sides`.
        accelerator, sharded: the processes, and whether the model is spread over them.
    """

    def __init__(
        self,
        adapter: Adapter,
        sides: Sides,
        objective: Objective,
        pairing: Pairing,
        accelerator: Any,
        sharded: bool,
        config: UnlearnConfig,
    ) -> None:
        self.adapter = adapter
        self.sides = sides
        self.objective = objective
        self.pairing = pairing
        self.accelerator = accelerator
        self.sharded = sharded
        self.config = config
        self.device: torch.device = accelerator.device
        self.dtype = autocast_dtype(config.dtype)
        self.lengths = sides.answer_lengths()
        self.inner = adapter.model
        self.model = spread(self.inner, accelerator, sharded)
        self.cross_entropy = choose_cross_entropy(
            config.cross_entropy,
            self.inner,
            collate(sides.forget[:1], sides.pad).to(self.device),
            positions=sides.most_positions(config.batch_size),
            whole_logits=objective.whole_logits,
            layer=objective.layer(self.inner),
            dtype=self.dtype,
        )
        self.optimizer = torch.optim.AdamW(
            adapter.parameter_groups(), weight_decay=config.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            functools.partial(rate_share, steps=pairing.steps(config.epochs), warmup=config.warmup),
        )

    @property
    def highest_rate(self) -> float:
        """The highest rate of any layer, after warm-up."""
        return float(self.scheduler.base_lrs[0])

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.inner.named_parameters() if p.requires_grad}

    def gradients(self, step: int) -> StepLosses:
        """Leave the clipped gradients of a step in the parameters, the same in every process."""
        config, process = self.config, self.accelerator.process_index
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(2, device=self.device)
        weights = shares(self.pairing, step, process, *self.lengths)
        for part, (forget_share, retain_share) in enumerate(weights):
            batch, rows = self.sides.batch(self.pairing.batch(step, part, process))
            batch = batch.to(self.device)
            reference = self._reference(batch)
            last = part == config.accumulation - 1
            travelling = gradients_travel(self.model, self.accelerator, self.sharded, last)
            with travelling, autocast(self.device, self.dtype):
                difference = self.objective(
                    self.cross_entropy.answers(self.model, batch),
                    batch,
                    rows,
                    reference=reference,
                    shares=(forget_share, retain_share),
                    part=1 / config.accumulation,
                )
                self.accelerator.backward(difference.loss)
            means = torch.stack(
                [forget_share * difference.forget, retain_share * difference.retain]
            )
            losses += means.to(losses)
        norm = nn.utils.clip_grad_norm_(self.trained().values(), config.clip or math.inf)
        # Averaged over processes, so that all see the same values and stop together.
        losses = self.accelerator.reduce(losses, reduction="mean")
        return StepLosses(*torch.stack([*losses, whole(norm).to(losses)]).tolist())

    def update(self, losses: StepLosses) -> float:
        """Take the step that these losses belong to; returns its highest learning rate."""
        rate = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()
        self.objective.after_step(losses.retain)
        return rate

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, in whole tensors; if sharded, all processes must call it."""
        return {
            "adapter": self.factors(),
            "optimizer": tree_map_only(torch.Tensor, whole, self.optimizer.state_dict()),
            "scheduler": self.scheduler.state_dict(),
            "objective": self.objective.state(),
            "frozen": {name: p.detach().clone() for name, p in self.adapter.frozen().items()},
        }

    def factors(self) -> dict[str, torch.Tensor]:
        """A copy of all A and B, whole; if sharded, all processes must call it."""
        return {name: whole(p.detach()).clone() for name, p in self.trained().items()}

    @torch.no_grad()
    def put_factors(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Restore what `factors` returned; each process takes its part."""
        for name, parameter in self.trained().items():
            parameter.copy_(like(factors[name], parameter))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a `state`; each process takes its part. Raises InputError for another model's."""
        if self.trained().keys() != state["adapter"].keys():
            raise InputError(
                "the checkpoint belongs to another model: give the one the run began with"
            )
        self.put_factors(state["adapter"])
        for name, parameter in self.adapter.frozen().items():
            parameter.data.copy_(state["frozen"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for owner, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.shape == owner.shape:
                    kept[name] = like(value, owner)
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.restore(state.get("objective", {}))

    @torch.no_grad()
    def _reference(self, batch: Batch) -> Answers | None:
        """The answers of the model as it was, from the same weights, without a second copy."""
        if not self.objective.needs_reference:
            return None
        self.model.eval()
        with self.adapter.disabled(), autocast(self.device, self.dtype):
            answers = self.cross_entropy.answers(self.model, batch)
        self.model.train()
        return answers


def rate_share(step: int, *, steps: int, warmup: float) -> float:
    """Share of the highest rate: it rises during warm-up, then falls to 0 after the last step."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return (steps - step) / max(1, steps - rising)

"""`rank="auto"` of a run: ranks by the gradients of the losses of a sample of each side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.models.ranks import RankAllocation, allocate_ranks
from fastbound.unlearning.config import RANK_ROWS, UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded, answer_length, collate
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.model import autocast, autocast_dtype, forward
from fastbound.unlearning.training.adapters import target_layers
from fastbound.unlearning.training.sides import Sides


def choose_ranks(
    model: nn.Module, sides: Sides, config: UnlearnConfig, accelerator: Any
) -> RankAllocation:
    """Ranks for the layers of an unadapted model, the same in every process.

    Raises:
        InputError: `target_modules` names no layer, or the budget is too small.
    """
    from accelerate.utils import broadcast_object_list

    model.to(accelerator.device)
    samples = (evenly(rows, RANK_ROWS) for rows in (sides.forget, sides.retain))
    forget, retain = (
        mean_loss(
            rows,
            sides.pad,
            batch_size=config.batch_size,
            device=accelerator.device,
            dtype=autocast_dtype(config.dtype),
        )
        for rows in samples
    )
    try:
        layers = target_layers(model, config)
        chosen = allocate_ranks(
            model, layers, forget, retain, budget=config.rank_budget, seed=config.seed
        )
    except (TypeError, ValueError) as error:
        raise InputError(f'rank "auto": {error}') from error
    if accelerator.num_processes > 1:
        (chosen,) = broadcast_object_list([chosen])
    return chosen


def mean_loss(
    rows: Sequence[Encoded],
    pad: int,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Callable[[nn.Module], Iterator[Tensor]]:
    """Losses of one batch each, which add up to the mean cross-entropy over all answer tokens."""
    tokens = sum(map(answer_length, rows))

    def parts(model: nn.Module) -> Iterator[Tensor]:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], pad).to(device)
            with autocast(device, dtype):
                logits = forward(model, batch.input_ids, batch.attention_mask)
            yield answer_tokens(logits, batch.labels).loss.sum() / tokens

    return parts

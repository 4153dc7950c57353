"""`rank="auto"` of a run: ranks by the gradients of the losses of a sample of each side."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.models.ranks import RankAllocation, allocate_ranks
from fastbound.unlearning.config import SAMPLE_ROWS, UnlearnConfig
from fastbound.unlearning.data.sampling import evenly
from fastbound.unlearning.model import autocast_dtype
from fastbound.unlearning.training.adapters import Layers
from fastbound.unlearning.training.sides import Sides, mean_loss


def choose_ranks(
    model: nn.Module, layers: Layers, sides: Sides, config: UnlearnConfig, accelerator: Any
) -> RankAllocation:
    """Ranks for these layers of an unadapted model, the same in every process.

    Raises InputError where `allocate_ranks` raises ValueError.
    """
    from accelerate.utils import broadcast_object_list

    model.to(accelerator.device)
    samples = (evenly(rows, SAMPLE_ROWS) for rows in (sides.forget, sides.retain))
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
        chosen = allocate_ranks(
            model, layers, forget, retain, budget=config.rank_budget, seed=config.seed
        )
    except (TypeError, ValueError) as error:
        raise InputError(f'rank "auto": {error}') from error
    if accelerator.num_processes > 1:
        (chosen,) = broadcast_object_list([chosen])
    return chosen

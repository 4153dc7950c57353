"""What a training step costs through the fused layer, and through PEFT's unfused one."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastbound
from fastbound.models.ranks import EVEN
from fastbound.performance.profiling.baselines import inject_peft
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Batch, Encoded, collate
from fastbound.unlearning.losses import gradient_difference
from fastbound.unlearning.model import autocast, autocast_dtype, forward, quiet
from fastbound.unlearning.runs.report import Comparison, StepCost


def compare_cost(
    model: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    pad: int,
    config: UnlearnConfig,
    *,
    steps: int = 15,
) -> Comparison:
    """Time both forms on copies of the unadapted `model`, where it stands; it is left alone.

    Unfused is PEFT's LoRA with a sine on its factors; of the form "product", or where omega stands
    in alpha's place, it is the plain formula under autograd.

    For `rank="auto"` both are of rank `EVEN` everywhere.
    """
    rows = [*forget[: config.batch_size], *retain[: config.batch_size]]
    n_forget = min(len(forget), config.batch_size)
    device = next(model.parameters()).device
    rank = EVEN if config.rank == "auto" else config.rank
    batch = collate(rows, pad).to(device)
    settings: dict[str, Any] = {
        "bound": config.bound,
        "form": config.form,
        "omega": config.omega,
        "target_modules": config.target_modules,
    }
    fused, unfused = copy.deepcopy(model), copy.deepcopy(model)
    names = fastbound.inject(fused, rank, alpha=config.alpha, **settings).replaced
    if config.form == "product" or config.omega is not None:
        settings |= {"backend": "reference", "fuse_mlp": False}
        fastbound.inject(unfused, rank, alpha=config.alpha, **settings)
    else:
        with quiet():
            unfused = inject_peft(
                unfused,
                rank,
                alpha=config.alpha,
                bound=config.bound,
                target_modules=list(names),
            )
    both = [_Stepper(each, batch, n_forget, config) for each in (fused, unfused)]
    seconds: list[list[float]] = [[], []]
    for turn in range(steps + 2):  # the first two warm up
        for i in (0, 1) if turn % 2 else (1, 0):
            taken = both[i].timed()
            if turn >= 2:
                seconds[i].append(taken)
    costs = [
        StepCost(statistics.median(taken), stepper.saved_bytes(), stepper.peak_bytes())
        for taken, stepper in zip(seconds, both, strict=True)
    ]
    return Comparison(costs[0], costs[1], steps, len(rows), batch.input_ids.numel())


class _Stepper:
    """Takes training steps of one model on one batch."""

    def __init__(
        self, model: nn.Module, batch: Batch, forget_rows: int, config: UnlearnConfig
    ) -> None:
        self.model = model.train()
        self.batch = batch
        self.forget_rows = forget_rows
        self.device = batch.input_ids.device
        self.dtype = autocast_dtype(config.dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        # No step changes anything: times do not depend on how far either form has moved.
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)

    def timed(self) -> float:
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - start

    def saved_bytes(self) -> int:
        kept = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in kept:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._loss()
        total = sum(saved.values())
        del loss  # until here the graph kept every storage alive, so that no address came twice
        return total

    def peak_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        self.timed()
        return torch.cuda.max_memory_allocated(self.device)

    def _loss(self) -> Tensor:
        with autocast(self.device, self.dtype):
            logits = forward(self.model, self.batch.input_ids, self.batch.attention_mask)
            return gradient_difference(logits, self.batch.labels, self.forget_rows).loss

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

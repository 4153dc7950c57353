"""The processes of a run: how they start, which part of the model each holds, and the weight of
each batch.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import fastbound
from fastbound.errors import InputError
from fastbound.unlearning.config import UnlearnConfig
from fastbound.unlearning.data.encoding import Encoded
from fastbound.unlearning.data.sampling import Pairing
from fastbound.unlearning.metrics.answers import Score, score
from fastbound.unlearning.model import check_device


def start_processes(config: UnlearnConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    check_device(config.device)
    # The loop has its own autocast: that of accelerate would convert all logits to fp32. It also
    # divides each loss itself, which accelerate would do again if its environment says so.
    try:
        return Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise InputError(
            "this process already uses accelerate with other settings, such as Trainer's bf16 or "
            "an Accelerator with mixed precision, of which it keeps one set for a process: unlearn "
            "in a process of its own"
        ) from error


def starts_first() -> bool:
    """Whether the launcher made this process the first, the only one that writes; known at once."""
    from accelerate.utils import get_int_from_env

    launchers = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return bool(get_int_from_env(launchers, 0) == 0)


def end_processes() -> None:
    """Destroy the process group, if there is one: otherwise gloo's threads abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def is_sharded(accelerator: Any, config: UnlearnConfig) -> bool:
    """Whether the model is spread over the processes; it is refused if it is not copied either.

    Raises InputError.
    """
    from accelerate.utils import parse_flag_from_env

    kind = str(accelerator.distributed_type.value)
    # On the CPU, accelerate itself would ignore its FSDP settings.
    fsdp = parse_flag_from_env("ACCELERATE_USE_FSDP")
    if fsdp and os.environ.get("FSDP_VERSION") != "2":
        kind = "FSDP1"
    if kind in ("DEEPSPEED", "MEGATRON_LM", "FSDP1"):
        raise InputError(
            f"{kind} of accelerate's configuration is not supported: set fsdp_version: 2, or use "
            "plain processes, with --shard (shard=True) where a copy of the model does not fit"
        )
    if not (config.shard or fsdp):
        return False
    if config.adapter != "bounded":
        raise InputError(f'shard spreads a model with adapter "bounded", got {config.adapter!r}')
    if accelerator.num_processes < 2:
        raise InputError("shard needs several processes: start with accelerate launch or torchrun")
    return True


def spread(model: nn.Module, accelerator: Any, sharded: bool) -> Any:
    """The model as this process holds it: a copy, or its part."""
    if sharded:
        return fastbound.shard(model.to(accelerator.device))
    return accelerator.prepare(model)


def gradients_travel(
    model: Any, accelerator: Any, sharded: bool, now: bool
) -> contextlib.AbstractContextManager[Any]:
    """Around a backward pass: whether gradients are summed over processes `now`, once per step."""
    if sharded:
        model.set_requires_gradient_sync(now)
    elif not now:
        return accelerator.no_sync(model)
    return contextlib.nullcontext()


def score_together(
    totals: Callable[[Sequence[Encoded]], list[float]],
    rows: Sequence[Encoded],
    batch_size: int,
    accelerator: Any,
    sharded: bool,
) -> Score:
    """Score `rows`, of which each process takes its share.

    Args:
        totals: gives the sums over some rows, `batch_size` of them per forward pass.
    """
    processes, process = accelerator.num_processes, accelerator.process_index
    parts = [rows[each::processes] for each in range(processes)]
    sums = totals(parts[process])
    if sharded:
        # A forward pass gathers weights from all processes: all must make as many as the first.
        batches = [math.ceil(len(part) / batch_size) for part in parts]
        for _ in range(batches[0] - batches[process]):
            totals(rows[:1])
    if processes > 1:
        sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device)).tolist()
    return score(sums)


def shares(
    pairing: Pairing, step: int, process: int, forget: Sequence[int], retain: Sequence[int]
) -> list[tuple[float, float]]:
    """The weights of the forget mean and of the retain mean, for each batch of a process in a step.

    Summed over batches and averaged over processes, as gradients are, the weighted means give the
    mean over all answer tokens of the step, whichever process holds them. In one process without
    accumulation both weights are 1.0.

    Args:
        forget, retain: number of answer tokens in each row.
    """
    parts, processes = range(pairing.accumulation), range(pairing.processes)
    tokens = {}
    for part in parts:
        for each in processes:
            to_forget, to_retain = pairing.batch(step, part, each)
            tokens[part, each] = (
                sum(forget[i] for i in to_forget),
                sum(retain[i] for i in to_retain),
            )
    all_forget, all_retain = map(sum, zip(*tokens.values(), strict=True))
    here = [tokens[part, process] for part in parts]
    return [
        (len(processes) * to_forget / all_forget, len(processes) * to_retain / all_retain)
        for to_forget, to_retain in here
    ]

"""Losses of answer tokens from whole logits or in chunks: chosen once per run, with the reason.

Of P positions in a pass, including padding and questions, T are answer tokens. With vocabulary V
and width K, whole logits take P·V numbers, and the products with the head take 4·P·V·K FLOPs in
forward and backward. Chunks take `CHUNK`·V numbers and 6·T·V·K FLOPs, because the logits of a chunk
are computed again in the backward pass and the head is applied only to answer tokens. Chunks
therefore take more time if more than two thirds of the positions are answer tokens, and less
otherwise. liger-kernel does the same work with fewer passes over a chunk's logits; its chunks have
logits about as large as the hidden states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbound.errors import InputError
from fastbound.operator.partition import partition
from fastbound.unlearning.data.encoding import Batch
from fastbound.unlearning.losses.chunked import CHUNK, chunked_answer_tokens
from fastbound.unlearning.losses.formulas import AnswerTokens
from fastbound.unlearning.losses.hidden import capturing
from fastbound.unlearning.losses.liger import liger_answer_tokens, liger_chunk, missing
from fastbound.unlearning.losses.objective import Answers
from fastbound.unlearning.model import autocast, evaluating, forward

WHOLE_BYTES = 2**28  # "auto" computes logits up to this size whole


@dataclass(frozen=True)
class CrossEntropy:
    """How the losses of answer tokens are computed.

    Attributes:
        form: "whole", "chunked", or "liger" (chunked by liger-kernel).
        reason: why this form was chosen.
        logits_bytes: size of the largest tensor of logits in any pass, in the dtype that the head
            returns; None for a head without float weights.
        head: the output embedding, if it is made to return losses instead of logits.
        layer: the layer whose hidden states are returned with the answers, or None.
    """

    form: Literal["whole", "chunked", "liger"]
    reason: str
    logits_bytes: int | None = None
    head: nn.Linear | None = field(default=None, repr=False, compare=False)
    layer: nn.Module | None = field(default=None, repr=False, compare=False)

    def answers(self, model: nn.Module, batch: Batch) -> Answers:
        """Run one pass of `model`: the model this was chosen for, or a wrapper around it."""
        with capturing(self.layer) as states:
            answers = self._answers(model, batch)
        return answers._replace(hidden=states[0]) if states else answers

    def _answers(self, model: nn.Module, batch: Batch) -> Answers:
        if self.head is None:
            logits = forward(model, batch.input_ids, batch.attention_mask)
            return Answers.of(logits, batch.labels)
        compute = liger_answer_tokens if self.form == "liger" else chunked_answer_tokens
        return Answers(_tokens(model, self.head, batch, compute))

    def as_dict(self) -> dict[str, Any]:
        return {"form": self.form, "reason": self.reason, "logits_bytes": self.logits_bytes}


WHOLE = CrossEntropy("whole", "asked for")


def choose_cross_entropy(
    setting: str,
    model: nn.Module,
    example: Batch,
    *,
    positions: int,
    whole_logits: Sequence[str] = (),
    layer: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> CrossEntropy:
    """The form for `setting`: "auto", "chunked", "liger" or "whole".

    "auto" uses chunks if whole logits would be larger than `WHOLE_BYTES` (by liger-kernel, if it is
    installed and there is a GPU), unless a loss needs whole logits, or the head is not a plain
    linear layer whose outputs are the logits. The latter is tested in one pass over a few tokens
    of `example`.

    Args:
        model: as it runs, adapted and sharded, on the device of `example`.
        positions: the largest number of tokens per pass, including padding.
        whole_logits: names of the losses that need whole logits.
        layer: the layer whose hidden states are returned with the answers, or None.
        dtype: dtype of autocast; None computes in the model's own dtype.

    Raises:
        InputError: `setting` is "chunked" or "liger" but chunks are not possible, or a pass needs
            more than the whole memory of the device.
    """
    chosen = _choose(
        setting, model, example, positions=positions, whole_logits=whole_logits, dtype=dtype
    )
    check_memory(model, example.input_ids.device, positions, chosen.logits_bytes, dtype)
    return dataclasses.replace(chosen, layer=layer)


def check_cross_entropy(setting: str, model: nn.Module, device: torch.device) -> None:
    """Raise `InputError` where `choose_cross_entropy` would for what can be told without a pass.

    Args:
        model: with or without weights and adapters.
        device: the one on which it will run.
    """
    if setting in ("chunked", "liger"):
        obstacle = missing(device) if setting == "liger" else None
        _refuse(setting, obstacle or _obstacle(model, _head(model), ()))


def _refuse(setting: str, obstacle: str | None) -> None:
    if obstacle is not None:
        raise InputError(f'cross_entropy "{setting}": {obstacle}; use "auto" or "whole"')


def check_memory(
    model: nn.Module,
    device: torch.device,
    positions: int,
    logits_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise `InputError` if the logits and last hidden states of a pass alone exceed all memory.

    Args:
        positions: number of positions of the pass, including padding.
        logits_bytes: size of the logits that exist at a time; None means whole logits.
        dtype: dtype of autocast; None computes in the model's own dtype.
    """
    head = _head(model)
    row = _row_bytes(head, dtype)
    if row is None:
        return
    hidden = positions * row // len(head.weight) * head.weight.shape[-1]
    needed = hidden + (positions * row if logits_bytes is None else logits_bytes)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise InputError(
            f"the largest batch has {positions} positions, whose logits and last hidden states "
            f"alone take {needed / 1e9:.4g} GB, and {device.type} has {total / 1e9:.4g} GB: give a "
            "smaller batch_size or shorter rows"
        )


def _choose(
    setting: str,
    model: nn.Module,
    example: Batch,
    *,
    positions: int,
    whole_logits: Sequence[str],
    dtype: torch.dtype | None,
) -> CrossEntropy:
    head = _head(model)
    row = _row_bytes(head, dtype)
    whole = None if row is None else positions * row
    if setting == "whole":
        return CrossEntropy("whole", "asked for", whole)
    if setting == "auto" and whole is not None and whole <= WHOLE_BYTES:
        return CrossEntropy("whole", f"auto, up to {WHOLE_BYTES / 1e6:.0f} MB", whole)
    no_liger = missing(example.input_ids.device)
    obstacle = no_liger if setting == "liger" else None
    obstacle = obstacle or _obstacle(model, head, whole_logits)
    obstacle = obstacle or _differs(model, head, example, dtype)
    if setting != "auto":
        _refuse(setting, obstacle)
    if obstacle is not None or whole is None or row is None:
        return CrossEntropy("whole", f"no chunks: {obstacle}", whole)
    reason = "asked for"
    if setting == "auto":
        reason = f"auto, whole logits would take {whole / 1e6:.4g} MB"
        reason += "" if no_liger is None else f"; {no_liger}"
    if setting == "liger" or (setting == "auto" and no_liger is None):
        chunk = liger_chunk(positions, *head.weight.shape)
        return CrossEntropy("liger", reason, chunk * row, head)
    return CrossEntropy("chunked", reason, min(CHUNK, positions) * row, head)


def _row_bytes(head: Any, dtype: torch.dtype | None) -> int | None:
    """Bytes of the logits of one position; None if the head has no weights to tell it."""
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point():
        return None
    return len(weight) * (dtype or weight.dtype).itemsize


def _head(model: nn.Module) -> Any:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _obstacle(model: nn.Module, head: Any, whole_logits: Sequence[str]) -> str | None:
    """Why chunks are not possible, as far as no pass is needed to tell; None if nothing is."""
    if whole_logits:
        return f"{' and '.join(whole_logits)} take whole logits"
    if head is None:
        return f"{type(model).__name__} names no output embedding (get_output_embeddings)"
    name = _name_of(model, head)
    if type(head) is not nn.Linear:
        return f"{name} is {type(head).__name__}, not a plain nn.Linear"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return f"{name} has hooks or a forward of its own"
    return None


def _name_of(model: nn.Module, head: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is head), "the head")


def _differs(
    model: nn.Module, head: nn.Linear, example: Batch, dtype: torch.dtype | None
) -> str | None:
    """Why chunks are not possible according to a pass over a few tokens, or None if they are.

    In that pass the head's output is replaced by a ramp, which a cap or a scale changes however
    small the logits of these tokens are.
    """
    seen: list[tuple[str | None, Tensor]] = []
    name = _name_of(model, head)

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        problem = None
        if partition(head.weight) is not None:
            problem = f"the weight of {name} {partition(head.weight)}"
        elif not torch.equal(F.linear(inputs[0], head.weight, head.bias), output):
            problem = f"{name} is more than x @ weight.T + bias"
        ramp = torch.linspace(-1000, 1000, output.shape[-1]).to(output).expand_as(output)
        seen.append((problem, ramp))
        return ramp

    device = example.input_ids.device
    hook = head.register_forward_hook(replace)
    try:
        with evaluating(model), autocast(device, dtype):
            logits = forward(model, example.input_ids[:1, :8], example.attention_mask[:1, :8])
    finally:
        hook.remove()
    if len(seen) != 1:
        return f"{name} runs {len(seen)} times in a pass"
    ((problem, ramp),) = seen
    if problem is None and not torch.equal(logits, ramp.to(logits.dtype)):
        return f"{type(model).__name__} changes what {name} returns (a cap or a scale)"
    return problem


def _tokens(
    model: nn.Module, head: nn.Linear, batch: Batch, compute: Callable[..., AnswerTokens]
) -> AnswerTokens:
    """Run a pass in which the head returns the losses of answer tokens `[1, tokens, 1]`.

    They are computed inside the head's own call, where FSDP2 has gathered its weight, and leave the
    model as its output, from which wrappers expect the backward pass to start.
    """
    found: list[AnswerTokens] = []

    def losses(hidden: Tensor) -> Tensor:
        found.append(compute(hidden, head.weight, batch.labels, head.bias))
        return found[0].loss.view(1, -1, 1)

    with _in_place_of_forward(head, losses):
        loss = forward(model, batch.input_ids, batch.attention_mask)
    return found[0]._replace(loss=loss.flatten())


@contextlib.contextmanager
def _in_place_of_forward(module: nn.Module, call: Callable[[Tensor], Tensor]) -> Iterator[None]:
    vars(module)["forward"] = call
    try:
        yield
    finally:
        del vars(module)["forward"]

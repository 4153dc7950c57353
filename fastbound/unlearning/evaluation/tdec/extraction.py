"""What a model makes of a sequence: its first choices, and how it goes on from every prefix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastbound.errors import NonFiniteError
from fastbound.performance.progress import progress
from fastbound.unlearning.data.encoding import Encoded, collate
from fastbound.unlearning.evaluation.generation import continuations, stop_tokens
from fastbound.unlearning.evaluation.session import Session
from fastbound.unlearning.model import forward


@torch.no_grad()
def first_choices(session: Session, ids: Sequence[int], where: str = "a sequence") -> list[int]:
    """argmax p(. | x_<i) for i = 1 .. T-1, from one forward."""
    batch = collate([Encoded(tuple(ids), tuple(ids), "")], session.pad).to(session.model.device)
    logits = forward(session.model, batch.input_ids, batch.attention_mask)
    if not torch.isfinite(logits).all():  # argmax would choose a token all the same
        raise NonFiniteError(
            f"{where}: its logits are not finite; the model is broken or overflows in "
            f"{session.model.dtype}: try --dtype float32"
        )
    return list(logits[0, :-1].argmax(-1).tolist())


def prefix_continuations(
    session: Session, ids: Sequence[int], predicted: Sequence[int]
) -> list[list[int]]:
    """Greedy continuation of every prefix x_<i, i = 1 .. T-1, up to T tokens in all.

    Where the model's first choice is x_i itself, the continuation is x_i and then that of the next
    prefix: only prefixes that the model gets wrong are generated.
    """
    T = len(ids)
    wrong = [i for i in range(1, T) if predicted[i - 1] != ids[i]]
    generated: dict[int, list[int]] = {}
    with progress(len(wrong), "prefixes", "prefix", shown=session.progress, nested=True) as bar:
        for start in range(0, len(wrong), session.batch_size):
            part = wrong[start : start + session.batch_size]
            prompts, most = [ids[:i] for i in part], [T - i for i in part]
            new = continuations(session.model, prompts, most, pad=session.pad, end=session.end)
            generated.update(zip(part, new, strict=True))
            bar.update(len(part))
    stops = stop_tokens(session.model, session.end)
    found: list[list[int]] = []
    after: list[int] = []
    for i in reversed(range(1, T)):
        own = [] if ids[i] in stops else [ids[i], *after]
        after = generated.get(i, own)
        found.append(after)
    return found[::-1]

"""Cross-entropy from hidden states, without ever holding all logits of a batch in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastbound.unlearning.losses.formulas import AnswerTokens, answer_positions

CHUNK = 256  # answer tokens per chunk: 131 MB of fp32 logits for a vocabulary of 128 thousand


def chunked_answer_tokens(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> AnswerTokens:
    """Compute `answer_tokens(hidden @ weight.T + bias, labels)`, `chunk` tokens at a time.

    The head is applied only to labelled positions. Their logits are freed after each chunk and
    computed again in the backward pass, so that at most `chunk · vocabulary` of them exist at once,
    and only their hidden states are saved.

    Args:
        hidden: `[rows, length, width]`, the input of the head.
        weight, bias: of the head, `[vocabulary, width]` and `[vocabulary]`.
        labels: int64 `[rows, length]`, `IGNORED` where there is nothing to predict.
        chunk: labelled tokens per chunk.

    Raises:
        ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    chosen, targets, row = answer_positions(hidden, labels)
    parts = zip(chosen.split(chunk), targets.split(chunk), strict=True)
    pairs = [
        checkpoint(
            _tokens, part, weight, bias, target, use_reentrant=False, preserve_rng_state=False
        )
        for part, target in parts
    ]
    loss, correct = (torch.cat(each) for each in zip(*pairs, strict=True))
    return AnswerTokens(loss, correct, row)


def _tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return loss, logits.detach().argmax(-1) == targets

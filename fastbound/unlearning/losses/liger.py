"""Cross-entropy from hidden states by liger-kernel's fused kernel, if that is installed."""

from __future__ import annotations

import importlib.metadata
import re

import torch
from torch import Tensor

from fastbound.unlearning.losses.formulas import AnswerTokens, answer_positions

OLDEST = "0.8.2"  # earlier versions silently give wrong gradients if tokens have unequal weights


def missing(device: torch.device) -> str | None:
    """Why the kernel cannot be used, or None if it can."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    if _numbers(version) < _numbers(OLDEST):
        return f"liger-kernel {version} is older than {OLDEST}"
    if device.type != "cuda":
        return f"liger-kernel needs a GPU, the model is on {device.type}"
    return None


def liger_answer_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> AnswerTokens:
    """The same result as `chunked_answer_tokens`, with the losses in fp32.

    As there, the head is applied only to labelled positions, and logits are computed again in the
    backward pass. Softmax, loss and their gradient are one kernel, which overwrites the logits.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    chosen, targets, row = answer_positions(hidden, labels)
    found = liger_fused_linear_cross_entropy(
        chosen, weight, targets, bias, reduction="none", return_predicted_tokens=True
    )
    return AnswerTokens(found.loss, found.predicted_tokens == targets, row)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def liger_chunk(tokens: int, vocabulary: int, width: int) -> int:
    """Tokens per chunk by liger-kernel's rule: logits about as large as the hidden states."""
    parts = -(-vocabulary // width)
    at_least = -(-tokens // parts)
    return min(tokens, 1 << (at_least - 1).bit_length())

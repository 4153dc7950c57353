"""A pass of a causal language model of transformers, and the autocast around it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn


def forward(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
    """Logits `[rows, length, vocabulary]`."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def autocast_dtype(name: str) -> torch.dtype | None:
    """What `autocast` takes for a setting's `dtype`: None for float32."""
    return torch.bfloat16 if name == "bfloat16" else None


def autocast(
    device: torch.device | str, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`, or nothing at all for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)

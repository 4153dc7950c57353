"""Teach a model the rows that it will have to forget, by training all of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastbound.performance.progress import progress
from fastbound.unlearning.data.encoding import collate, encode_all, padding
from fastbound.unlearning.data.rows import Row
from fastbound.unlearning.losses import answer_tokens
from fastbound.unlearning.model import autocast, forward

RATE = 1e-4  # of AdamW, falling to 0
EPOCHS = 8
BATCH = 8
CLIP = 1.0


def teach(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    epochs: int = EPOCHS,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> float:
    """Train all weights of `model`, in place; the mean loss of the last epoch, nats per token.

    Args:
        dtype: the dtype of autocast; None computes in fp32, which is faster on a CPU without bf16.
    """
    encoded, pad = encode_all(rows, tokenizer), padding(tokenizer)
    starts = range(0, len(encoded), BATCH)
    steps = epochs * len(starts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    losses: list[float] = []
    with progress(steps, "teaching", "step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(encoded), generator=generator).tolist()
            losses = []
            for first in starts:
                batch = collate([encoded[i] for i in order[first : first + BATCH]], pad)
                with autocast("cpu", dtype):
                    logits = forward(model, batch.input_ids, batch.attention_mask)
                    loss = answer_tokens(logits, batch.labels).loss.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                bar.update()
    model.eval()
    return sum(losses) / len(losses)

"""Greedy continuations in batches, padded on the left so that generation continues every row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastbound.unlearning.data.limits import table_of_positions


@torch.no_grad()
def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most: Sequence[int],
    *,
    pad: int,
    end: int,
) -> list[list[int]]:
    """The model's greedy continuation of each prompt (argmax per token), without the end of text.

    Of the model's generation settings only the end of text is used; all others, such as a
    repetition penalty, blocked n-grams, stop strings and sampling, are ignored. Padding is masked,
    so that a row continues as it does alone. Keys and values of earlier tokens are cached.

    Args:
        prompts: token ids, at least one per prompt.
        most: the largest number of tokens to generate for each prompt, at least one.
        pad: token to pad with.
        end: end-of-text token, if the model's generation settings name none.
    """
    length = max(map(len, prompts))
    room = table_of_positions(model)
    if len(prompts) > 1 and room is not None and length + max(most) - 1 > room:
        # A batch runs until its last row has ended: alone, no row runs beyond what it asks for.
        return [
            continuations(model, [prompt], [limit], pad=pad, end=end)[0]
            for prompt, limit in zip(prompts, most, strict=True)
        ]
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    stops = stop_tokens(model, end)
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=max(most), do_sample=False, pad_token_id=pad, eos_token_id=sorted(stops)
    )
    with _only(greedy, model):
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
        )
    new = output[:, length:].tolist()
    return [_cut(tokens[:limit], stops) for tokens, limit in zip(new, most, strict=True)]


def until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def stop_tokens(model: Any, end: int) -> set[int]:
    """The tokens that end a text: those of the model's generation settings, or else `end`."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(ends, int):
        return {ends}
    return set(ends or [end])


@contextlib.contextmanager
def _only(settings: Any, model: nn.Module) -> Iterator[None]:
    """Use only `settings`: `generate` would fill unset ones with the model's own settings."""
    held = [(m, vars(m)["generation_config"]) for m in model.modules() if _has_settings(m)]
    for module, _ in held:
        module.generation_config = settings
    try:
        yield
    finally:
        for module, own in held:
            module.generation_config = own


def _has_settings(module: nn.Module) -> bool:
    return "generation_config" in vars(module)


def _cut(tokens: list[int], stops: set[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[:i]
    return tokens

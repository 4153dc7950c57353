"""Whether rows fit a model: its number of positions, and the tokens that it embeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import Any

from torch import nn

from fastbound.errors import InputError
from fastbound.unlearning.data.encoding import Encoded, padding


def check_fits(
    model: nn.Module, tokenizer: Any, rows: Iterable[Encoded], new: Iterable[int] | None = None
) -> None:
    """Raise `InputError` for the first row with too many tokens or a token without embedding.

    A row longer than the number of positions in the model's config is refused whatever their kind.
    Tokens that the model generates count only if positions are looked up in a table, as in GPT-2;
    rotary positions can exceed the number.

    Args:
        new: for each row, the largest number of tokens that the model generates; None means none.
    """
    limit, rotary = _positions(model), _is_rotary(model)
    known = _embedded(model)
    if known is not None:
        _check_token(padding(tokenizer), "the padding token", tokenizer, known)
    for row, most in zip(rows, repeat(0) if new is None else new, strict=False):
        # The last token that is generated needs no position.
        adding = 0 if rotary else max(0, most - 1)
        if limit is not None and len(row.ids) + adding > limit:
            and_new = f" and up to {most} new ones" if adding else ""
            raise InputError(
                f"{row.where}: takes {len(row.ids)} tokens{and_new}, more than the {limit} "
                "positions of the model (max_position_embeddings of its config): shorten the row, "
                "leave it out, or take a model with more"
            )
        if known is not None and row.ids:
            _check_token(max(row.ids), row.where, tokenizer, known)


def _check_token(token: int, where: str, tokenizer: Any, known: int) -> None:
    if token >= known:
        raise InputError(
            f"{where}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) has no "
            f"embedding: the tokenizer has {len(tokenizer)} tokens, the model {known}: call "
            f"model.resize_token_embeddings({len(tokenizer)}) and save the model again, or take "
            "the tokenizer that it was trained with"
        )


def _embedded(model: nn.Module) -> int | None:
    """The number of tokens that the model can both read and predict; None if unknown."""
    known = []
    for find, size in (
        ("get_input_embeddings", "num_embeddings"),
        ("get_output_embeddings", "out_features"),
    ):
        try:
            known.append(getattr(getattr(model, find)(), size))
        except (AttributeError, NotImplementedError):
            continue
    return min(known, default=None)


def _positions(model: nn.Module) -> int | None:
    """The number of positions in the model's config, with its RoPE scaling; None if not given."""
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "alibi", False):
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [each for each in (rope, *rope.values()) if isinstance(each, Mapping)]
    stretched = [
        int(each["factor"] * (each.get("original_max_position_embeddings") or limit))
        for each in scalings
        if each.get("factor")
    ]
    return max(limit, *stretched, 0)


def _is_rotary(model: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


def table_of_positions(model: nn.Module) -> int | None:
    """The size of the table in which the model looks its positions up; None if it has none."""
    return None if _is_rotary(model) else _positions(model)

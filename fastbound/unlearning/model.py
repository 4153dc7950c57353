"""A causal language model of transformers: loading it, a pass of it, and the autocast around."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastbound.errors import InputError


def load_pretrained(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Model (weights in `dtype`) and fast tokenizer.

    Args:
        name: folder written by `save_pretrained`, or id on the hub.

    Raises:
        InputError: it cannot be loaded; the reason is transformers' own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # hub, files and configurations each raise their own
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model {name!r} cannot be loaded ({type(error).__name__}: {reason}); give a folder "
            "made by save_pretrained or a model id, and check the network for an id"
        ) from error
    return model, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers, the run has its own, and no warning that is PEFT's to mend."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers has deprecated.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in backward, in the non-reentrant form. Raises InputError."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{kind}_checkpointing_enable", None)  # renamed in transformers 5.23
    if enable is None:
        raise InputError(f"{type(model).__name__} has no gradient checkpointing: leave it off")
    enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})


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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; then in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

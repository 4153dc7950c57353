"""Digests by which a run recognises its model, its tokenizer, its rows and its own state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbound.unlearning.data.encoding import Encoded

_WORDS = 1 << 16
_OF_THE_FILES = (
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
)


def digest(value: Any) -> str:
    """Digest of plain values and tensors, however nested: of types, names, shapes and every bit."""
    state = hashlib.blake2b(digest_size=16)
    _add(state, value)
    return state.hexdigest()


def fingerprint(rows: Sequence[Encoded]) -> str:
    """Hash of tokens and labels, the same for the same rows, template and tokenizer."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps([row.ids, row.labels]).encode())
    return whole.hexdigest()[:16]


def model_identity(model: nn.Module) -> dict[str, str]:
    """`weights` covers every bit of the state with adapters, `architecture` class and settings.

    It reads all weights once on their own device, at some gigabytes per second on one CPU core.
    """
    config: Any = getattr(model, "config", None)
    settings = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    adapters = getattr(model, "peft_config", None) or {}
    about = {
        "class": type(model).__name__,
        "settings": {k: v for k, v in settings.items() if k not in _OF_THE_FILES},
        "adapters": {name: _plain(vars(each)) for name, each in adapters.items()},
    }
    return {
        "weights": digest(dict(sorted(model.state_dict().items()))),
        "architecture": digest(json.dumps(about, sort_keys=True, default=str)),
    }


def tokenizer_identity(tokenizer: Any) -> str:
    """Digest of its vocabulary, its special tokens and its chat template."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    words = sorted(tokenizer.get_vocab().items())
    return digest([words, special, str(getattr(tokenizer, "chat_template", None))])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of PEFT, with sets in a fixed order and without the place of the base model."""
    return {
        name: sorted(map(str, value)) if isinstance(value, (set, frozenset)) else value
        for name, value in values.items()
        if name not in ("base_model_name_or_path", "revision", "inference_mode")
    }


def _add(state: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        if not value.is_meta:
            _add_bits(state, value)
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)}".encode())
        for name, each in value.items():
            _add(state, name)
            _add(state, each)
    elif isinstance(value, (list, tuple)):
        state.update(f"{type(value).__name__} {len(value)}".encode())
        for each in value:
            _add(state, each)
    else:
        text = repr(value).encode(errors="surrogatepass")
        state.update(f"{type(value).__name__} {len(text)} ".encode() + text)


@torch.no_grad()
def _add_bits(state: Any, value: Tensor) -> None:
    """Add the bits as sums of 64-bit words with odd weights, one per 512 KiB, on their own device.

    If a single word changes, so does its sum; if several do, it stays the same with a probability
    of about 2**-63. Sums run at the speed of memory; hashing all bits takes 20 seconds of one core
    for 16 GB.
    """
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    words = raw[: len(raw) // 8 * 8].view(torch.int64)
    weights = _weights(raw.device)
    sums = [(part * weights[: len(part)]).sum() for part in words.split(_WORDS)]
    if sums:
        state.update(torch.stack(sums).cpu().numpy())
    state.update(raw[len(words) * 8 :].cpu().numpy())


def _weights(device: torch.device) -> Tensor:
    """Odd weights with well-mixed bits (the finaliser of splitmix64), the same everywhere."""
    mixed = torch.arange(1, _WORDS + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed | 1

"""Digests by which a run knows its model, its tokenizer, its rows and its own state again."""

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
    """Of plain values and tensors, however nested: types, names, shapes and every bit."""
    state = hashlib.blake2b(digest_size=16)
    _add(state, value)
    return state.hexdigest()


def fingerprint(rows: Sequence[Encoded]) -> str:
    """Hash of tokens and labels: the same for the same rows, template and tokenizer."""
    whole = hashlib.sha256()
    for row in rows:
        whole.update(json.dumps([row.ids, row.labels]).encode())
    return whole.hexdigest()[:16]


def model_identity(model: nn.Module) -> dict[str, str]:
    """`weights`: every bit of the state, adapters included; `architecture`: class and settings.

    Reads all weights once where they lie, at some gigabytes per second on one core of a CPU.
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
    """Of its words, its special tokens and its chat template."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    words = sorted(tokenizer.get_vocab().items())
    return digest([words, special, str(getattr(tokenizer, "chat_template", None))])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of PEFT: sets in an order, and not where the base was loaded from."""
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
    """The bits by a sum of 64-bit words with odd weights over each 512 KiB, on its own device.

    No single word can change without its sum, and more can by a chance of about 2**-63. Sums are
    at memory speed, where hashing all bits takes 20 seconds of a core for 16 GB.
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
    """Odd, with bits well mixed (the finaliser of splitmix64), and the same everywhere."""
    mixed = torch.arange(1, _WORDS + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed | 1

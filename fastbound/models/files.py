"""The two files of an adapter, in PEFT's layout: what they hold, written whole and read checked.

`adapter_model.safetensors` and `adapter_config.json` are the same files that the PEFT method writes
and reads (`BoundedConfig`), in both directions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastbound.errors import positive
from fastbound.files import replace_files
from fastbound.layers.settings import AdapterSettings, adapter_settings, rank_stabilised
from fastbound.models.names import check_same_names, lookup
from fastbound.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_TYPE = "FASTBOUND"
FORMAT_VERSION = 1
DISAGREE = "do not agree with the saved adapter"


@dataclass(frozen=True)
class SavedLayer:
    """What the files say about one layer: enough to build it, nothing that depends on the base."""

    settings: AdapterSettings
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]


def read_adapter(folder: Path) -> dict[str, SavedLayer]:
    """Both files, checked against each other."""
    for path in (folder / CONFIG, folder / TENSORS):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: {folder} does not hold a saved adapter")
    config = _read_config(folder / CONFIG)
    data = (folder / TENSORS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != config.get("tensors_sha256", digest):
        raise ValueError(
            f"{folder / TENSORS} is not the file that {CONFIG} was written with: one of them is "
            "damaged or from another save; copy both again"
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {error}") from error
    names = list(config["shapes"]) or _names(tensors)
    keys = [tensor_key(name, factor) for name in names for factor in "AB"]
    check_same_names(f"{folder}: tensors {DISAGREE}", tensors, keys)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / TENSORS}: {key} holds a NaN or an infinity")
    saved = {}
    for name in names:
        A, B = tensors[tensor_key(name, "A")], tensors[tensor_key(name, "B")]
        rank = lookup(config["rank_pattern"], name, config["r"])
        N, K = config["shapes"].get(name, (B.shape[0], A.shape[1]))
        if A.shape != (rank, K) or B.shape != (N, rank) or A.dtype != B.dtype:
            raise ValueError(
                f"{folder / TENSORS}: A of {name} is {A.dtype} {list(A.shape)} and B {B.dtype} "
                f"{list(B.shape)}, but {CONFIG} says [{rank}, {K}] and [{N}, {rank}] of one dtype"
            )
        alpha = lookup(config["alpha_pattern"], name, config["alpha"])
        if config["use_rslora"]:
            alpha = rank_stabilised(rank, alpha)
        bound = lookup(config["bound_pattern"], name, config["bound"])
        if isinstance(bound, str):
            raise ValueError(
                f'{folder / CONFIG}: bound of {name} is "{bound}", not the value it had'
            )
        settings = adapter_settings(rank, alpha, bound, config["dropout"], A.dtype)
        saved[name] = SavedLayer(settings, A, B)
    return saved


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not even UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != PEFT_TYPE:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type must be {PEFT_TYPE!r}, got {kind!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {config.get('format_version')!r} was written by fastbound "
            f"{config.get('fastbound_version')}; this is fastbound {__version__}, which reads "
            f"format_version {FORMAT_VERSION}"
        )
    _check_fields(config, path)
    if config["dropout"] is None:  # an earlier version's file
        config["dropout"] = 0.0
    for field in ("bias", "modules_to_save", "trainable_token_indices"):
        if config.get(field) not in (None, "none"):
            raise ValueError(
                f"{path}: {field} is {config[field]!r}: what PEFT trained beside the adapter "
                "cannot be loaded here; use PeftModel.from_pretrained"
            )
    for field in ("alpha_pattern", "bound_pattern"):
        for layer, value in config[field].items():
            positive(f"{path}: {field} of {layer}", value)
    for layer, shape in config["shapes"].items():
        if not (isinstance(shape, list) and len(shape) == 2):
            raise ValueError(f"{path}: shapes of {layer} must be [N, K], got {shape!r}")
    return config


def _check_fields(config: dict[str, Any], path: Path) -> None:
    fields: dict[str, Any] = {
        "r": int,
        "alpha": int | float | None,
        "bound": int | float | str | None,
        "dropout": int | float | None,
        "rank_pattern": dict,
        "alpha_pattern": dict,
        "bound_pattern": dict,
        "shapes": dict,
        "use_rslora": bool | None,
    }
    if "tensors_sha256" in config:  # `save_adapter` wrote it, which names every layer everywhere
        fields |= {"target_modules": list, "tensors_sha256": str}
    for name, kind in fields.items():
        if not isinstance(config.setdefault(name, None), kind):
            word = getattr(kind, "__name__", kind)
            raise ValueError(f"{path}: {name} must be a {word}, got {config[name]!r}")
    if "tensors_sha256" in config:
        for name in ("rank_pattern", "alpha_pattern", "bound_pattern", "shapes"):
            check_same_names(f"{path}: {name} {DISAGREE}", config[name], config["target_modules"])


def tensor_key(name: str, factor: str) -> str:
    """PEFT's form; for a model that is itself the layer the name is empty."""
    return f"base_model.model.{name}.fastbound_ab.{factor}"


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers that the keys of A name."""
    start, end = tensor_key("\0", "A").split("\0")
    return [k[len(start) : -len(end)] for k in tensors if k.startswith(start) and k.endswith(end)]


def model_fields(model: nn.Module) -> dict[str, str | None]:
    """What both configs say of the model.

    ``task_type`` is PEFT's word for what it is, which its AutoPeftModelForCausalLM asks for;
    ``base_model_name_or_path`` is what it was loaded from.
    """
    causal = type(model).__name__.endswith("ForCausalLM")
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return {
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": name or None,
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Without torch.compile's and DistributedDataParallel's shells, which change the names."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file."""
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def write_adapter(folder: Path, tensors: bytes, config: Mapping[str, Any]) -> None:
    """Both files, the folder made if need be; earlier ones are replaced only by whole ones."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2).encode()
    replace_files({folder / TENSORS: tensors, folder / CONFIG: text})

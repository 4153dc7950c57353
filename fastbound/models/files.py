"""The two files of an adapter, in PEFT's layout: written atomically and checked when read.

`adapter_model.safetensors` and `adapter_config.json` are the same files that the PEFT method
(`BoundedConfig`) writes and reads, so that each side can load what the other saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastbound.errors import InputError, NotThereError, positive
from fastbound.files import replace_files
from fastbound.layers.settings import AdapterSettings, adapter_settings, rank_stabilised
from fastbound.models.names import check_same_names, lookup
from fastbound.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_TYPE = "FASTBOUND"
FORMAT_VERSIONS = {"factors": 1, "product": 2}  # earlier releases read only 1, without a form
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DISAGREE = "do not agree with the saved adapter"


@dataclass(frozen=True)
class SavedLayer:
    """What the files say about one layer: enough to build it without reading the base's weight."""

    settings: AdapterSettings
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]


def read_adapter(folder: Path) -> dict[str, SavedLayer]:
    """Read both files and check them against each other.

    Raises InputError, which names the file, for anything that is not as it was written.
    """
    if os.path.isfile(folder):
        raise InputError(f"{folder} is a file: give the folder of a saved adapter")
    for path in (folder / CONFIG, folder / TENSORS):
        if not os.path.exists(path):  # Path.exists() raises if the name is too long
            raise NotThereError(f"{path} does not exist: {folder} does not hold a saved adapter")
    config = _read_config(folder / CONFIG)
    data = _read(folder / TENSORS)
    digest = hashlib.sha256(data).hexdigest()
    if digest != config.get("tensors_sha256", digest):
        raise InputError(
            f"{folder / TENSORS} is not the file that {CONFIG} was written with: one of them is "
            "damaged or from another save; copy both again"
        )
    tensors = _read_tensors(folder / TENSORS, data)
    names = list(config["shapes"]) or _names(tensors)
    if not names:
        raise InputError(f"{folder / TENSORS} holds no factors: copy the adapter's folder again")
    keys = [tensor_key(name, factor) for name in names for factor in "AB"]
    # PEFT also writes the frozen weight of an adapted output layer or embedding.
    frozen = {f"base_model.model.{name}.base_layer." for name in names}
    tensors = {key: t for key, t in tensors.items() if not key.startswith(tuple(frozen))}
    check_same_names(f"{folder}: tensors {DISAGREE}", tensors, keys)
    return {
        name: _saved_layer(folder, name, config, tensors[key_A], tensors[key_B])
        for name, key_A, key_B in zip(names, keys[::2], keys[1::2], strict=True)
    }


def _saved_layer(
    folder: Path, name: str, config: dict[str, Any], A: Tensor, B: Tensor
) -> SavedLayer:
    if A.ndim != 2 or B.ndim != 2:
        raise InputError(
            f"{folder / TENSORS}: A and B of {name} must be matrices, got {list(A.shape)} and "
            f"{list(B.shape)}: copy the adapter's folder again"
        )
    try:
        rank = lookup(config["rank_pattern"], name, config["r"])
        alpha = lookup(config["alpha_pattern"], name, config["alpha"])
        if config["use_rslora"]:
            alpha = rank_stabilised(rank, alpha)
        bound = lookup(config["bound_pattern"], name, config["bound"])
    except re.error as error:
        raise InputError(
            f"{folder / CONFIG}: a key of its patterns is not a regular expression ({error}): copy "
            "the adapter's folder again"
        ) from error
    if isinstance(bound, str):
        raise InputError(
            f'{folder / CONFIG}: bound of {name} is "{bound}", not the number that it stood for: '
            "save the adapter from a model that holds it"
        )
    try:
        settings = adapter_settings(
            rank, alpha, bound, config["dropout"], A.dtype, form=config["form"]
        )
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: {name}: {error}: copy the folder again") from error
    N, K = config["shapes"].get(name, (B.shape[0], A.shape[1]))
    if A.shape != (rank, K) or B.shape != (N, rank) or A.dtype != B.dtype:
        raise InputError(
            f"{folder / TENSORS}: A of {name} is {A.dtype} {list(A.shape)} and B {B.dtype} "
            f"{list(B.shape)}, but {CONFIG} says [{rank}, {K}] and [{N}, {rank}] of one dtype: "
            "copy both files again, from one save"
        )
    return SavedLayer(settings, A, B)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors' own, and Python's for a malformed header
        raise InputError(f"{path} is damaged ({error}): copy the adapter's folder again") from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise InputError(f"{path}: {key} is {tensor.dtype}, a dtype that adapters do not have")
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: {key} holds a NaN or an infinity: go back to an adapter saved earlier"
            )
    return tensors


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter config of any method. Raises InputError if it is not a JSON object."""
    data = _read(path)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not even UTF-8
        raise InputError(f"{path} is damaged ({error}): copy the adapter's folder again") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(config).__name__}")
    return config


def _read_config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    if config.get("peft_type") != PEFT_TYPE:
        raise InputError(
            f"{path}: peft_type must be {PEFT_TYPE!r}, got {config.get('peft_type')!r}: load an "
            "adapter of another method with PEFT"
        )
    known = FORMAT_VERSIONS.values()
    if config.get("format_version") not in known:
        raise InputError(
            f"{path}: format_version {config.get('format_version')!r} was written by fastbound "
            f"{config.get('fastbound_version')}; this is fastbound {__version__}, which reads "
            f"format_version {' and '.join(map(str, known))}"
        )
    _check_fields(config, path)
    config["form"] = config["form"] or "factors"
    if FORMAT_VERSIONS.get(config["form"]) != config["format_version"]:
        raise InputError(
            f"{path}: form {config['form']!r} and format_version {config['format_version']!r} do "
            "not belong together: copy the adapter's folder again"
        )
    if config["dropout"] is None:  # an earlier version's file
        config["dropout"] = 0.0
    for field in ("bias", "modules_to_save", "trainable_token_indices"):
        if config.get(field) not in (None, "none"):
            raise InputError(
                f"{path}: {field} is {config[field]!r}, but weights that PEFT trained beside the "
                "adapter cannot be loaded here; use PeftModel.from_pretrained"
            )
    for field in ("alpha_pattern", "bound_pattern"):
        for layer, value in config[field].items():
            positive(f"{path}: {field} of {layer}", value)
    for layer, rank in config["rank_pattern"].items():
        if not _is_size(rank):
            raise InputError(f"{path}: rank_pattern of {layer} must be an integer, got {rank!r}")
    for layer, shape in config["shapes"].items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape))):
            raise InputError(f"{path}: shapes of {layer} must be [N, K], got {shape!r}")
    return config


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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
        "form": str | None,
    }
    if "tensors_sha256" in config:  # written by `save_adapter`, which lists every layer everywhere
        fields |= {"target_modules": list | str, "tensors_sha256": str}
    for name, kind in fields.items():
        value = config.setdefault(name, None)
        if not isinstance(value, kind) or (isinstance(value, bool) and name != "use_rslora"):
            word = getattr(kind, "__name__", kind)
            raise InputError(f"{path}: {name} must be a {word}, got {value!r}")
    if "tensors_sha256" in config:
        for name in ("rank_pattern", "alpha_pattern", "bound_pattern"):
            check_same_names(f"{path}: {name} {DISAGREE}", config[name], config["shapes"])
        if isinstance(config["target_modules"], list):
            targets = map(str, config["target_modules"])
            check_same_names(f"{path}: target_modules {DISAGREE}", targets, config["shapes"])


def tensor_key(name: str, factor: str) -> str:
    """PEFT's key of a factor; the name is empty if the model is itself the layer."""
    return f"base_model.model.{name}.fastbound_ab.{factor}"


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers, taken from the keys of A."""
    start, end = tensor_key("\0", "A").split("\0")
    return [k[len(start) : -len(end)] for k in tensors if k.startswith(start) and k.endswith(end)]


def model_fields(model: nn.Module) -> dict[str, str | None]:
    """The fields of both configs that describe the model.

    ``task_type`` is PEFT's name for the kind of model, which AutoPeftModelForCausalLM needs;
    ``base_model_name_or_path`` is where the model was loaded from.
    """
    causal = type(model).__name__.endswith("ForCausalLM")
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return {
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": name or None,
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DistributedDataParallel and PEFT.

    Those change the names of its layers.
    """
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as the bytes of a safetensors file."""
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def write_adapter(folder: Path, tensors: bytes, config: Mapping[str, Any]) -> None:
    """Write both files atomically, creating the folder if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2).encode()
    replace_files({folder / TENSORS: tensors, folder / CONFIG: text})

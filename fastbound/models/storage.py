"""Adapters as files: `adapter_model.safetensors` and `adapter_config.json`, in PEFT's layout.

The same files that the PEFT method writes and reads (`BoundedConfig`), in both directions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastbound.layers.adapter import check_settings
from fastbound.layers.conversion import convert, refusal
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.over_base import features
from fastbound.models.injection import (
    InjectionReport,
    adapted_layers,
    describe,
    fuse,
    injected_layers,
)
from fastbound.models.patterns import lookup
from fastbound.operator.partition import is_dtensor, like, whole
from fastbound.version import __version__

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PEFT_TYPE = "FASTBOUND"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class _SavedLayer:
    """What the files say about one layer: enough to build it, nothing that depends on the base."""

    alpha: float
    bound: float
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]
    dropout: float


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write A, B, alpha and bound of every `FusedBoundedLinear` of `model` to `folder`.

    `adapter_model.safetensors` holds `base_model.model.<layer>.fastbound_ab.A` [r, K] and `.B`
    [N, r] bit for bit, in their own dtype; a layer that the model holds under several names is
    written once. `adapter_config.json` holds the numbers: each layer's rank, alpha and bound as
    they are, so that `bound="auto"` comes back as the value it had, whatever the base is then. PEFT
    loads the folder, too (`PeftModel.from_pretrained`), where fastbound is imported.

    The folder is made if need be, and files of an earlier save are replaced only by whole ones.

    Of a model sharded by FSDP2 the factors are gathered: all processes must call this, the first
    writes, and the files are there when it returns.

    Raises ValueError when the model holds no such layer, or a factor is not finite or is sharded
    in another way.
    """
    model = unwrapped(model)
    layers = injected_layers(model)
    if len(adapted_layers(model)) > len(layers):
        raise ValueError("the adapters are PEFT's: save them with model.save_pretrained(folder)")
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no FusedBoundedLinear: nothing to save")
    tensors = {
        _key(name, factor): _whole(name, factor, layer)
        for name, layer in layers.items()
        for factor in "AB"
    }
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": task_type(model),
        "format_version": FORMAT_VERSION,
        "fastbound_version": __version__,
        "base_model_name_or_path": base_name(model),
        "r": statistics.mode(layer.rank for layer in layers.values()),
        "alpha": statistics.mode(layer.alpha for layer in layers.values()),
        "bound": statistics.mode(layer.bound for layer in layers.values()),
        "dropout": statistics.mode(layer.adapter.dropout for layer in layers.values()),
        "target_modules": list(layers),
        "rank_pattern": {name: layer.rank for name, layer in layers.items()},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items()},
        "bound_pattern": {name: layer.bound for name, layer in layers.items()},
        "shapes": {n: [layer.out_features, layer.in_features] for n, layer in layers.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    folder = Path(folder)
    sharded = any(is_dtensor(layer.adapter.A) for layer in layers.values())
    if not sharded or torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files(
            {folder / TENSORS: data, folder / CONFIG: json.dumps(config, indent=2).encode()}
        )
    if sharded:
        torch.distributed.barrier()


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, fuse_mlp: bool = True
) -> InjectionReport:
    """Load what `save_adapter`, or a PEFT model's `save_pretrained`, wrote into `model`, in place.

    A plain model gets exactly the saved layers, as `inject` would make them, and the rest frozen;
    `fuse_mlp` as there.
    An injected model must hold the same layers at the same rank and dtype; its A, B, alpha and
    bound are overwritten. Everything is checked before anything is changed.

    Returns the same report as `inject`.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: the files are damaged or do not belong together, hold a NaN or an infinity, are
            of another method or format version, or are for another model, shape, rank or dtype; or
            `model` holds adapters of PEFT's, which loads its own.
    """
    model = unwrapped(model)
    if len(adapted_layers(model)) > len(injected_layers(model)):
        raise ValueError("the model's adapters are PEFT's: use model.load_adapter(folder, name)")
    saved = _read(Path(folder))
    layers = injected_layers(model)
    if layers:
        _check_injected(layers, saved)
    else:
        _check_plain(model, saved)
        convert(
            model,
            {
                name: {
                    "rank": entry.A.shape[0],
                    "alpha": entry.alpha,
                    "bound": entry.bound,
                    "dropout": entry.dropout,
                    "adapter_dtype": entry.A.dtype,
                }
                for name, entry in saved.items()
            },
        )
        if fuse_mlp:
            fuse(model)
        layers = injected_layers(model)
    with torch.no_grad():
        for name, entry in saved.items():
            adapter = layers[name].adapter
            adapter.A.copy_(like(entry.A, adapter.A))
            adapter.B.copy_(like(entry.B, adapter.B))
            adapter.alpha, adapter.bound = entry.alpha, entry.bound
    return describe(model)


def _read(folder: Path) -> dict[str, _SavedLayer]:
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
    _same("tensors", tensors, [_key(name, factor) for name in names for factor in "AB"], folder)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{folder / TENSORS}: {key} holds a NaN or an infinity")
    saved = {}
    for name in names:
        A, B = tensors[_key(name, "A")], tensors[_key(name, "B")]
        rank = lookup(config["rank_pattern"], name, config["r"])
        N, K = config["shapes"].get(name, (B.shape[0], A.shape[1]))
        if A.shape != (rank, K) or B.shape != (N, rank) or A.dtype != B.dtype:
            raise ValueError(
                f"{folder / TENSORS}: A of {name} is {A.dtype} {list(A.shape)} and B {B.dtype} "
                f"{list(B.shape)}, but {CONFIG} says [{rank}, {K}] and [{N}, {rank}] of one dtype"
            )
        alpha = lookup(config["alpha_pattern"], name, config["alpha"])
        bound = lookup(config["bound_pattern"], name, config["bound"])
        if isinstance(bound, str):
            raise ValueError(
                f'{folder / CONFIG}: bound of {name} is "{bound}", not the value it had'
            )
        alpha, bound = check_settings(rank, alpha, bound)
        saved[name] = _SavedLayer(alpha, bound, A, B, config["dropout"])
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
    for field in ("bias", "modules_to_save"):
        if config.get(field) not in (None, "none"):
            raise ValueError(
                f"{path}: {field} is {config[field]!r}: what PEFT trained beside the adapter "
                "cannot be loaded here; use PeftModel.from_pretrained"
            )
    for field in ("alpha_pattern", "bound_pattern"):
        for layer, value in config[field].items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{path}: {field} of {layer} must be positive and finite, got {value!r}"
                )
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
    }
    if "tensors_sha256" in config:  # `save_adapter` wrote it, which names every layer everywhere
        fields |= {"target_modules": list, "tensors_sha256": str}
    for name, kind in fields.items():
        if not isinstance(config.setdefault(name, None), kind):
            word = getattr(kind, "__name__", kind)
            raise ValueError(f"{path}: {name} must be a {word}, got {config[name]!r}")
    if "tensors_sha256" in config:
        for name in ("rank_pattern", "alpha_pattern", "bound_pattern", "shapes"):
            _same(name, config[name], config["target_modules"], path)


def _check_injected(layers: dict[str, FusedBoundedLinear], saved: dict[str, _SavedLayer]) -> None:
    _same("layers", layers, saved, "the model")
    for name, entry in saved.items():
        adapter = layers[name].adapter
        for factor in "AB":
            here, there = getattr(adapter, factor), getattr(entry, factor)
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(
                    f"{factor} of {name} is {here.dtype} {list(here.shape)} in the model and "
                    f"{there.dtype} {list(there.shape)} in the file: inject with "
                    f"rank={entry.A.shape[0]} and adapter_dtype={entry.A.dtype}, "
                    "or load into a plain model"
                )


def _check_plain(model: nn.Module, saved: dict[str, _SavedLayer]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in saved if name not in modules]
    if missing:
        raise ValueError(
            f"the adapter is for another model: {type(model).__name__} has no {_some(missing)}"
        )
    for name, entry in saved.items():
        reason = refusal(model, name)
        if reason is not None:
            raise ValueError(f"the adapter does not fit on {name}: it {reason}")
        stored = [entry.B.shape[0], entry.A.shape[1]]
        here = list(features(modules[name]))
        if here != stored:
            raise ValueError(
                f"the adapter is for another model: {name} is [N, K] = {here} in the model and "
                f"{stored} in the file"
            )


def _same(what: str, found: Any, wanted: Any, where: object) -> None:
    """Raise unless both hold the same names."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        raise ValueError(
            f"{where}: {what} do not agree with the saved adapter: "
            f"missing {_some(missing)}, unexpected {_some(extra)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(map(repr, names[:5])) or "none") + more


def _key(name: str, factor: str) -> str:
    """PEFT's form; for a model that is itself the layer the name is empty."""
    return f"base_model.model.{name}.fastbound_ab.{factor}"


def _names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers that the keys of A name."""
    start, end = _key("\0", "A").split("\0")
    return [k[len(start) : -len(end)] for k in tensors if k.startswith(start) and k.endswith(end)]


def task_type(model: nn.Module) -> str | None:
    """PEFT's word for what the model is, which its AutoPeftModelForCausalLM asks for."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def base_name(model: nn.Module) -> str | None:
    """The path or name that the model was loaded from."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or None


def _whole(name: str, factor: str, layer: FusedBoundedLinear) -> Tensor:
    tensor: Tensor = getattr(layer.adapter, factor)
    r, N, K = layer.rank, layer.out_features, layer.in_features
    shape = (r, K) if factor == "A" else (N, r)
    tensor = whole(tensor.detach())
    if type(tensor) is not Tensor or tensor.shape != shape:
        raise ValueError(
            f"adapter.{factor} of {name} is a {type(tensor).__name__} {list(tensor.shape)}, "
            f"not a whole tensor {list(shape)}: gather the sharded model's parameters first"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"adapter.{factor} of {name} holds a NaN or an infinity: nothing is saved")
    return tensor.cpu().contiguous()


def unwrapped(model: nn.Module) -> nn.Module:
    """Without torch.compile's and DistributedDataParallel's shells, which change the names."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def replace_files(files: dict[Path, bytes]) -> None:
    """Write all files beside their places, then move each into its place."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, data in files.items():
            with open(parts[path], "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)

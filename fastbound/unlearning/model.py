"""Causal language models of transformers: loading them, their forward pass, and autocast."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import fastbound
from fastbound.errors import InputError, did_you_mean
from fastbound.models.adapted import adapted_layers, came_with_adapter, injected_layers
from fastbound.models.files import CONFIG as ADAPTER_CONFIG
from fastbound.models.files import PEFT_TYPE, read_config
from fastbound.models.names import kind_of, some

_CONFIGS = ("config.json", ADAPTER_CONFIG)


def load_pretrained(
    name: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Model (weights in `dtype`) and fast tokenizer.

    Args:
        name: folder written by `save_pretrained`, or model id on the hub.
        trust_remote_code: run the code that the model brings with it. Otherwise a model that needs
            code of its own is refused, without a prompt on standard input.

    Raises:
        InputError: it cannot be loaded, for transformers' own reason; its files lack weights, which
            would be drawn at random, or hold layers or adapters that would be left out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_place(name)
    with _refusing(name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    _check_complete(name, model, loading)
    return model, tokenizer


def load_shape(
    name: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """As `load_pretrained`, but the model has no weights: all of it is on the meta device.

    Raises InputError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    check_place(name)
    with _refusing(name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        settings = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=dtype, trust_remote_code=trust_remote_code
            )
    return model, tokenizer


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever keeps a model from being loaded is an InputError of one line."""
    try:
        yield
    except Exception as error:  # hub, files and configurations each raise their own
        if "trust_remote_code" in str(error):
            raise InputError(
                f"model {name!r} brings code of its own, which is not run unless you ask for it: "
                "read it, then give --trust-remote-code (trust_remote_code=True)"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model {name!r} cannot be loaded ({type(error).__name__}: {reason}); give a folder "
            "made by save_pretrained or a model id, and check the network for an id"
        ) from error


def check_place(name: str) -> None:
    """Say what is wrong with a model's folder before the hub is asked for a model of that name.

    Raises:
        InputError: the name is that of a file or of a folder without a model; it is no folder and
            can be no id on the hub; or the hub is off and its cache does not have the model.
    """
    if not name:
        raise InputError("model is empty: give a folder made by save_pretrained, or a model id")
    if os.path.isdir(name):
        files = (os.path.join(name, file) for file in _CONFIGS)
        if not any(map(os.path.exists, files)):
            raise InputError(
                f"model {name!r} is a folder without config.json: give one made by save_pretrained"
            )
    elif os.path.exists(name):
        raise InputError(f"model {name!r} is a file: give a folder made by save_pretrained")
    elif not _is_id(name) or ("/" in name and os.path.isdir(os.path.dirname(name))):
        raise InputError(
            f"model {name!r} does not exist: give a folder made by save_pretrained, or a model id"
            f"{_near_folder(name)}"
        )
    else:
        _check_hub(name)


def _is_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_hub(name: str) -> None:
    """A name that can be an id: refused where nobody can be asked, else said before the wait."""
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in _CONFIGS):
        return
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"model {name!r}: there is no such folder, and no such model in the hub's cache, which "
            f"is all there is while HF_HUB_OFFLINE is set{_near_folder(name)}"
        )
    print(
        f"model {name!r}: there is no such folder here, so the Hugging Face hub is asked for it",
        file=sys.stderr,
    )


def _near_folder(name: str) -> str:
    """The folder beside it that was perhaps meant, as the end of a message."""
    parent, base = os.path.split(name.rstrip("/"))
    try:
        with os.scandir(parent or ".") as entries:
            folders = [entry.name for entry in entries if entry.is_dir()]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    return did_you_mean(base, folders, before=os.path.join(parent, ""))


def _check_complete(name: str, model: nn.Module, loading: Mapping[str, Any]) -> None:
    lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if lacking:
        raise InputError(
            f"model {name!r}: its files lack {some(lacking)}, which would be random: config.json "
            "and weights do not belong together; copy the whole folder again"
        )
    unused = sorted(loading["unexpected_keys"])
    adapters = [key for key in unused if re.search(r"\.adapter\.[AB]$", key)]
    if adapters and not _holds_adapter(model):
        raise InputError(
            f"model {name!r}: its files hold {some(adapters)}, an adapter of fastbound that "
            "would be ignored: save the model with this version, or merged (fastbound.merge)"
        )
    kinds = {kind_of(key) for key in model.state_dict()}
    layers = [key for key in unused if key not in adapters and kind_of(key) in kinds]
    if layers:
        raise InputError(
            f"model {name!r}: its files hold {some(layers)}, layers that its config.json leaves "
            "out: the two do not belong together; copy the whole folder again"
        )


def _holds_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, fastbound.BoundedLayer) for module in model.modules())


def check_plain(model: nn.Module, name: str) -> None:
    """Raise InputError for a model that was loaded with an adapter."""
    if getattr(model, "peft_config", None):
        raise InputError(
            f"model {name!r} comes with an adapter: merge it first "
            f"({_merging(model)}, then save_pretrained to another folder)"
        )


def _merging(model: nn.Module) -> str:
    """How to merge the adapter that transformers found beside a model, which it cannot itself."""
    if adapted_layers(model):
        return "from_pretrained, then fastbound.merge"
    return (
        "from_pretrained from a folder without adapter_config.json, then PeftModel.from_pretrained "
        "and merge_and_unload"
    )


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter, written by `fastbound.save_adapter` or PEFT, into `model` and return it.

    Raises:
        InputError: the folder holds no adapter, a damaged one, or one for another model.
    """
    path = Path(folder)
    if not os.path.isdir(path):  # unlike Path.is_dir(), does not raise if the name is too long
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise InputError(f"adapter {folder} {what}: give the folder of an adapter")
    if not (path / ADAPTER_CONFIG).exists():
        raise InputError(f"adapter {folder} has no {ADAPTER_CONFIG}: give an adapter's folder")
    check_plain(model, type(model).__name__)
    config = read_config(path / ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise InputError(
            f"{path / ADAPTER_CONFIG}: peft_type must name the adapter's method, got {kind!r}"
        )
    trained = [config.get(field) for field in ("bias", "modules_to_save")]
    if kind == PEFT_TYPE and set(map(str, trained)) <= {"None", "none"}:
        fastbound.load_adapter(model, folder)
        return model
    tensors = [f"adapter_model.{ending}" for ending in ("safetensors", "bin")]
    if not any((path / name).is_file() for name in tensors):
        raise InputError(
            f"adapter {folder} has no {' or '.join(tensors)}: give an adapter's folder"
        )
    try:
        return _load_with_peft(model, path)
    except InputError:
        raise
    except Exception as error:  # PEFT, safetensors and pickle each raise their own types
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"adapter {folder} cannot be loaded ({type(error).__name__}: {reason}): give a folder "
            "that PEFT's save_pretrained wrote for this model"
        ) from error


def _load_with_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Raises InputError where PEFT only warns, for missing and unexpected tensors."""
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu")
    for key, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"adapter {folder}: {key} holds a NaN or an infinity")
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # we raise for them below
        adapted = PeftModel.from_pretrained(model, str(folder))
    held = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = [key for key in held if key not in saved]
    known = {*held, *adapted.state_dict()}
    unknown = [key for key in saved if key not in known]
    if missing or unknown:
        raise InputError(
            f"adapter {folder}: its tensors do not match its config and this model: missing "
            f"{some(missing)}, unexpected {some(unknown)}; give the adapter of this model"
        )
    return cast(nn.Module, adapted)


def adapter_of(model: nn.Module) -> str | None:
    """Which library's adapter a model holds: "fastbound", "PEFT" (any method) or None."""
    if getattr(model, "peft_config", None):
        return "PEFT"
    return "fastbound" if injected_layers(model) else None


def merged(model: nn.Module) -> nn.Module:
    """Merge the adapter's ΔW into the weights in place; a model without adapter is unchanged.

    Raises InputError if ΔW cannot be merged into a weight, for example a quantised one, and for
    another method's adapter that transformers loaded with the model.
    """
    kind, came_with = adapter_of(model), came_with_adapter(model)
    if kind is None:
        return model
    if came_with and not adapted_layers(model):
        raise InputError(f"transformers loaded this model with an adapter: {_merging(model)}")
    try:
        if kind == "PEFT" and not came_with:
            return cast(nn.Module, cast(Any, model).merge_and_unload())
        return fastbound.merge(model)
    except (TypeError, ValueError) as error:  # PEFT raises both
        raise InputError(str(error)) from error


def check_device(device: str) -> None:
    """Raise InputError if a GPU is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError('device "cuda": this torch sees no CUDA device; use "auto" or "cpu"')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars (the run has its own) and a warning about PEFT's code."""
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
    """The dtype to pass to `autocast` for a `dtype` setting: None for float32."""
    return torch.bfloat16 if name == "bfloat16" else None


def autocast(
    device: torch.device | str, dtype: torch.dtype | None
) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype`; no autocast for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode, and gradients are off."""
    with keeping_modes(model), torch.no_grad():
        model.eval()
        yield


@contextlib.contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """After this context every module is in training or eval mode as it was before.

    Modules that were added within it take the mode of `model`.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        model.train(modes[0][1])  # the first of a model's modules is the model
        for module, training in modes:
            module.training = training

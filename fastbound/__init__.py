"""Bounded low-rank adapters, fused: y = x Wᵀ + bias + scaling · (x sin(ωA)ᵀ) sin(ωB)ᵀ, W frozen.

The names in `__all__` are the whole public interface. They are imported on first use, so that
`import fastbound` costs nothing and pulls in neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbound.peft_hook import register_with_peft

if TYPE_CHECKING:
    from fastbound.adapter import BoundedAdapter
    from fastbound.explanation import explain
    from fastbound.function import bounded_linear
    from fastbound.injection import InjectionReport, disable_adapter, inject, merge
    from fastbound.linear import FusedBoundedLinear
    from fastbound.lora_export import export_lora
    from fastbound.mlp import FusedBoundedMLP
    from fastbound.over_base import BoundedOverBase
    from fastbound.peft_method import BoundedConfig, BoundedLayer, BoundedModel
    from fastbound.ranks import RankAllocation, allocate_ranks
    from fastbound.sharding import shard
    from fastbound.storage import load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "BoundedAdapter",
    "BoundedConfig",
    "BoundedLayer",
    "BoundedModel",
    "BoundedOverBase",
    "FusedBoundedLinear",
    "FusedBoundedMLP",
    "InjectionReport",
    "RankAllocation",
    "allocate_ranks",
    "bounded_linear",
    "disable_adapter",
    "explain",
    "export_lora",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "shard",
]

# No module here has the name of a public function: importing a submodule binds its name on the
# package, and `fastbound.inject` would turn from the function into the module.
_HOME = {
    "BoundedAdapter": "adapter",
    "BoundedConfig": "peft_method",
    "BoundedLayer": "peft_method",
    "BoundedModel": "peft_method",
    "BoundedOverBase": "over_base",
    "FusedBoundedLinear": "linear",
    "FusedBoundedMLP": "mlp",
    "InjectionReport": "injection",
    "RankAllocation": "ranks",
    "allocate_ranks": "ranks",
    "bounded_linear": "function",
    "disable_adapter": "injection",
    "explain": "explanation",
    "export_lora": "lora_export",
    "inject": "injection",
    "load_adapter": "storage",
    "merge": "injection",
    "save_adapter": "storage",
    "shard": "sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _bind_kernels() -> None:
    """Make the checkout's `kernels/` importable as `fastbound.kernels` where pip has not.

    A wheel holds fastbound/kernels/; a bare checkout and an editable install have the folder beside
    the package, without an `__init__.py` (one would shadow Hugging Face's `kernels`).
    """
    name = f"{__name__}.kernels"
    folder = Path(__file__).resolve().parent.parent / "kernels"
    if importlib.util.find_spec(name) is None and folder.is_dir():
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = globals()["kernels"] = importlib.util.module_from_spec(spec)


_bind_kernels()
register_with_peft()

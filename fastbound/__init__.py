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

from fastbound.models.hook import keep_adapters_in_save_pretrained
from fastbound.peft.hook import register_with_peft
from fastbound.version import __version__ as __version__

if TYPE_CHECKING:
    from fastbound.layers.adapter import BoundedAdapter
    from fastbound.layers.linear import FusedBoundedLinear
    from fastbound.layers.mlp import FusedBoundedMLP
    from fastbound.layers.over_base import BoundedOverBase
    from fastbound.models.explanation import explain
    from fastbound.models.injection import disable_adapter, inject, merge
    from fastbound.models.lora_export import export_lora
    from fastbound.models.ranks import RankAllocation, allocate_ranks
    from fastbound.models.report import InjectionReport
    from fastbound.models.sharding import shard
    from fastbound.models.storage import load_adapter, save_adapter
    from fastbound.operator.engine import set_planning
    from fastbound.operator.function import bounded_linear
    from fastbound.peft.method import BoundedConfig, BoundedLayer, BoundedModel
    from fastbound.performance.warming import warmup

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
    "set_planning",
    "shard",
    "warmup",
]

# No module here has the name of a public function: importing a submodule binds its name on the
# package, and `fastbound.inject` would turn from the function into the module.
_HOME = {
    "BoundedAdapter": "layers.adapter",
    "BoundedConfig": "peft.method",
    "BoundedLayer": "peft.method",
    "BoundedModel": "peft.method",
    "BoundedOverBase": "layers.over_base",
    "FusedBoundedLinear": "layers.linear",
    "FusedBoundedMLP": "layers.mlp",
    "InjectionReport": "models.report",
    "RankAllocation": "models.ranks",
    "allocate_ranks": "models.ranks",
    "bounded_linear": "operator.function",
    "disable_adapter": "models.injection",
    "explain": "models.explanation",
    "export_lora": "models.lora_export",
    "inject": "models.injection",
    "load_adapter": "models.storage",
    "merge": "models.injection",
    "save_adapter": "models.storage",
    "set_planning": "operator.engine",
    "shard": "models.sharding",
    "warmup": "performance.warming",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


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
keep_adapters_in_save_pretrained()

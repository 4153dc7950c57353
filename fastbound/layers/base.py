"""Properties of layers: of any linear layer, of one to be adapted, and of an adapted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastbound.operator.partition import is_dtensor

if TYPE_CHECKING:
    from fastbound.layers.adapter import BoundedAdapter

# Hooks that PyTorch itself sets to recompute the weight before each call; they do not change x.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
QUANTISED = ("bitsandbytes.", "torchao.")


class Adapted:
    """The interface through which blocks and reports read adapted layers, ours and PEFT's."""

    weight: Any
    bias: Any
    fan_in_fan_out: bool
    in_features: int
    out_features: int
    adapter: Any  # BoundedAdapter; None if PEFT's layer runs no adapter or more than one

    def running(self) -> list[BoundedAdapter]:
        """The adapters whose terms the forward adds."""
        return [self.adapter]

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why this layer cannot run as part of a block's operator, or None if it can."""
        raise NotImplementedError

    def merge_obstacle(self) -> str | None:
        """Why ΔW cannot be merged into the weight, with the remedy, or None if it can."""
        raise NotImplementedError

    def to_linear(self, merge: bool = True) -> nn.Module:
        """The layer without its adapter, with ``merge`` with the weight W + ΔW."""
        raise NotImplementedError


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D; does not import transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer is exactly nn.Linear or Conv1D, so that its call computes x Wᵀ + b."""
    return type(layer) is nn.Linear or is_conv1d(layer)


def has_linear_forward(layer: nn.Module) -> bool:
    """Whether its class, which may be a subclass, computes as nn.Linear or Conv1D does."""
    return type(layer).forward is nn.Linear.forward or is_conv1d(layer)


def is_adaptable(layer: nn.Module) -> bool:
    """Whether it is an nn.Linear, a subclass (such as bitsandbytes' layers), or a Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def transposed(layer: Any) -> bool:
    """Whether the weight is stored as [K, N]."""
    return layer.fan_in_fan_out if isinstance(layer, Adapted) else is_conv1d(layer)


def layout_of(layer: Any) -> str:
    """How the weight is stored, as plans name it: "rows", or "columns" for [K, N]."""
    return "columns" if transposed(layer) else "rows"


def features(layer: Any) -> tuple[int, int]:
    """(N, K) of a layer, even if its weight is stored in a packed form."""
    if is_conv1d(layer):
        K, N = layer.weight.shape
        return N, K
    return int(layer.out_features), int(layer.in_features)


def weight_shape(layer: Any) -> tuple[int, int]:
    """(N, K) of an unpacked weight, whether it is stored as [N, K] or [K, N]."""
    N, K = layer.weight.shape
    return (K, N) if transposed(layer) else (N, K)


def over_reason(layer: Any) -> str | None:
    """Why the layer itself must compute x Wᵀ, or None if the operator can read its weight."""
    if parametrize.is_parametrized(layer):
        return "base has a parametrization"
    if not is_linear(layer):
        return f"base is {type(layer).__name__}"
    if offloaded(layer):
        return f"base has accelerate's {type(layer._hf_hook).__name__}"
    made = weight_hooks(layer)
    if made:
        return f"base has {type(made[0]).__name__}"
    if hooked(layer):
        return "base has hooks"
    if is_quantised(layer):
        return f"base holds its weight as {type(layer.weight).__name__}"
    return None


def is_quantised(layer: nn.Module) -> str | None:
    """In what form the weight is quantised, judging by its class; None if it is not quantised."""
    for parameter in layer.parameters(recurse=False):
        if type(parameter).__module__.startswith(QUANTISED):
            return f"its base holds the weight as {type(parameter).__name__}"
        if not parameter.is_floating_point():
            return f"its base, a {type(layer).__name__}, holds the weight as {parameter.dtype}"
    return None


def offloaded(layer: Any) -> bool:
    """Whether accelerate moves the weight and x to a device for each call."""
    hook = getattr(layer, "_hf_hook", None)
    return type(hook).__module__ == "accelerate.hooks" and hasattr(hook, "execution_device")


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks of its own that run when it is called."""
    return any(getattr(module, kind) for kind in _HOOKS)


def hooked_everywhere() -> bool:
    """Whether global hooks, as set by `register_module_forward_hook`, run for every module."""
    return bool(_has_any_global_hook())


def keeps_no_output(layer: nn.Module) -> bool:
    """Whether nothing else can hold the tensor that a call returns.

    That is so if no hook sees it, and the forward is that of nn.Linear, of Conv1D or of one of the
    known quantisation packages.
    """
    kind = type(layer)
    known = (
        kind.forward is nn.Linear.forward
        or is_conv1d(layer)
        or kind.__module__.startswith(QUANTISED)
    )
    own = "forward" in layer.__dict__ and not offloaded(layer)
    plain_call = kind.__call__ is nn.Module.__call__
    return known and plain_call and not own and not hooked(layer) and not hooked_everywhere()


def weight_hooks(layer: Any) -> list[Any]:
    """The forward pre-hooks that only recompute the weight."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]


def foreign_pre_hooks(layer: Any) -> bool:
    """Whether hooks may change x before the layer sees it; the adapter would see the original."""
    return len(weight_hooks(layer)) < len(layer._forward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks or accelerate's offloading depend on this module being called."""
    return hooked(module) or "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def tensor_obstacle(tensors: Mapping[str, Tensor | None], gathered: bool = False) -> str | None:
    """Why a layer's tensors cannot be read outside its own forward, or None if they can.

    ``gathered`` means that DTensors will be plain tensors by the time of a forward, as in a unit of
    FSDP2.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        ordinary = type(tensor) is nn.Parameter or type(tensor) is Tensor
        if not ordinary and not (gathered and is_dtensor(tensor)):
            return f"has a {type(tensor).__name__} for {name}, which the layer itself must handle"
        if hasattr(tensor, "ds_id"):
            return f"has its {name} partitioned by DeepSpeed ZeRO-3, which gathers it for the layer"
        if not tensor.is_floating_point():
            return f"has its {name} in {tensor.dtype}"
    return None

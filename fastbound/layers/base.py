"""What is read of a layer: of any linear one, of one to be adapted, and of an adapted one."""

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

# Hooks that PyTorch itself sets to make the weight anew before each call; they leave x alone.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
QUANTISED = ("bitsandbytes.", "torchao.")


class Adapted:
    """What blocks and reports read of an adapted layer, `FusedBoundedLinear` or PEFT's."""

    weight: Any
    bias: Any
    fan_in_fan_out: bool
    in_features: int
    out_features: int
    adapter: Any  # BoundedAdapter; None where PEFT's layer runs none, or more than one

    def running(self) -> list[BoundedAdapter]:
        """The adapters whose terms a forward adds."""
        return [self.adapter]

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why this layer cannot run inside a block's operator, or None."""
        raise NotImplementedError


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' Conv1D, told without importing transformers."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(layer: nn.Module) -> bool:
    """An nn.Linear or a Conv1D, and no subclass: its call is x Wᵀ + b."""
    return type(layer) is nn.Linear or is_conv1d(layer)


def is_adaptable(layer: nn.Module) -> bool:
    """An nn.Linear, one of its subclasses (bitsandbytes' are), or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def transposed(layer: Any) -> bool:
    """Whether the weight is stored as [K, N]."""
    return layer.fan_in_fan_out if isinstance(layer, Adapted) else is_conv1d(layer)


def features(layer: Any) -> tuple[int, int]:
    """N and K of a layer, whatever its weight is packed into."""
    if is_conv1d(layer):
        K, N = layer.weight.shape
        return N, K
    return int(layer.out_features), int(layer.in_features)


def weight_shape(layer: Any) -> tuple[int, int]:
    """N and K of a weight that is numbers, whichever way it is stored."""
    N, K = layer.weight.shape
    return (K, N) if transposed(layer) else (N, K)


def over_reason(layer: Any) -> str | None:
    """Why a layer's own call must compute x Wᵀ; None where the operator can read its weight."""
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
    """What the weight is quantised as, told by its class; None where it is not."""
    for parameter in layer.parameters(recurse=False):
        if type(parameter).__module__.startswith(QUANTISED):
            return f"its base holds the weight as {type(parameter).__name__}"
        if not parameter.is_floating_point():
            return f"its base, a {type(layer).__name__}, holds the weight as {parameter.dtype}"
    return None


def offloaded(layer: Any) -> bool:
    """Whether accelerate places the weight for each call, and x with it."""
    hook = getattr(layer, "_hf_hook", None)
    return type(hook).__module__ == "accelerate.hooks" and hasattr(hook, "execution_device")


def hooked(module: nn.Module) -> bool:
    """Whether calls of the module run hooks of its own."""
    return any(getattr(module, kind) for kind in _HOOKS)


def hooked_everywhere() -> bool:
    """Whether calls of every module run hooks, as `register_module_forward_hook` sets them."""
    return bool(_has_any_global_hook())


def keeps_no_output(layer: nn.Module) -> bool:
    """Whether what a call returns is surely nobody else's: no hook and no code unknown sees it.

    Known are nn.Linear's own forward, Conv1D's, and those of the packages that quantise.
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
    """The forward pre-hooks that only make the weight."""
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]


def foreign_pre_hooks(layer: Any) -> bool:
    """Whether hooks may change x before the layer sees it: the adapter would take another x."""
    return len(weight_hooks(layer)) < len(layer._forward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether something depends on this module being called: hooks, or accelerate's offloading."""
    return hooked(module) or "forward" in module.__dict__ or "_hf_hook" in module.__dict__


def tensor_obstacle(tensors: Mapping[str, Tensor | None], gathered: bool = False) -> str | None:
    """Why a layer's tensors cannot be read outside its own forward, or None.

    ``gathered``: DTensors are plain tensors by the time of a forward, as in a unit of FSDP2.
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

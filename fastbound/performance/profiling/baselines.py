"""The competitors: the same adapter run by PEFT's own unfused forward pass.

`inject_peft` and `peft_linear` change only one thing in PEFT's LoRA layer: they put a sine on its
two factors, through PEFT's `LoraVariant` hook. Casts, passes over memory, dropout and saved
activations stay those of PEFT's LoRA layer, which makes it a fair baseline for the fused operator:

    result = base_layer(x);  x = x.to(A.dtype)
    result = result + linear(linear(x, sin(ωA)), sin(ωB)) · s

Do not save such a model with PEFT: its files cannot record the sine, and it would be loaded as
plain LoRA. To keep an adapter, use `fastbound.save_adapter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbound.errors import positive
from fastbound.layers.bounds import bound_of_weight, weight_bound

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["inject_peft", "peft_linear"]

_ADAPTER = "default"  # PEFT's default name for an adapter


class _SineClasses(NamedTuple):
    config: Any
    layer: Any


def inject_peft(
    model: nn.Module,
    rank: int = 8,
    *,
    alpha: float | None = None,
    bound: float | str | None = None,
    target_modules: str | Sequence[str],
    variant: Literal["sine", "lora"] = "sine",
    adapter_dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Add unfused PEFT adapters to `model` in place, and freeze everything else.

    With `variant="sine"` every adapted layer computes `y = W x + b + s · sin(ωB) sin(ωA) x` with
    `s = bound / rank` and `ω = sqrt(alpha / bound)`. With `variant="lora"` it is PEFT's LoRA,
    `y = W x + b + (alpha / rank) · B A x`. A `[rank, K]` starts Kaiming-uniform, and B `[N, rank]`
    starts at zero.

    Args:
        model: any module with `nn.Linear` (or transformers `Conv1D`) layers.
        rank: width of the adapter, at least 1.
        alpha: slope of the adapter near zero, times rank; `None` means `rank`.
        bound: largest magnitude of an entry of ΔW; `None` means `alpha`. A string is relative to
            each layer's weight, see `FusedBoundedLinear`. Only for `variant="sine"`.
        target_modules: a list of name suffixes, or a regular expression, as in PEFT.
        variant: `"sine"` or `"lora"`.
        adapter_dtype: dtype of A and B; float32 is also PEFT's default.

    Returns:
        The `PeftModel` around `model`.

    Raises:
        ValueError: rank, alpha, bound or variant is out of range, or nothing matches
            `target_modules`.
        RuntimeError: the installed PEFT does not have the `LoraVariant` hook in the form used here.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    slope = positive("alpha", rank if alpha is None else alpha)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    if variant == "lora":
        if bound is not None:
            raise ValueError(f"plain LoRA has no bound: omit bound={bound!r} or use variant='sine'")
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=cast(int, slope), target_modules=targets)
    elif variant == "sine":
        if bound is None:
            bound = slope
        elif isinstance(bound, str):
            weight_bound(bound)
        else:
            bound = positive("bound", bound)
        config = _sine_config(rank, targets, alpha=slope, bound=bound)
    else:
        raise ValueError(f"variant must be 'sine' or 'lora', got {variant!r}")
    return _adapt(model, config, adapter_dtype)


def peft_linear(
    layer: nn.Linear,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    omega: float,
    adapter_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """PEFT's unfused module around one linear layer, with copies of the given A and B.

    Computes `layer(x) + scaling · sin(omega·B) sin(omega·A) x`. Freezes `layer`, whose weight it
    shares.

    Args:
        layer: the frozen layer, with weight `[N, K]`.
        A: `[rank, K]`.
        B: `[N, rank]`.
        scaling: factor on the adapter's output.
        omega: factor inside both sines.
        adapter_dtype: dtype in which A and B are stored.

    Raises:
        ValueError: the shapes of A, B and the layer do not match.
        RuntimeError: the installed PEFT does not have the `LoraVariant` hook in the form used here.
    """
    rank, (N, K) = A.shape[0], layer.weight.shape
    if A.shape != (rank, K) or B.shape != (N, rank):
        raise ValueError(
            f"A must be [rank, {K}] and B [{N}, rank] for this layer, "
            f"got A {list(A.shape)} and B {list(B.shape)}"
        )
    config = _sine_config(rank, ["0"], alpha=1.0, bound=1.0)
    adapted = cast(Any, _adapt(nn.Sequential(layer), config, adapter_dtype)).base_model.model[0]
    adapted.scaling[_ADAPTER] = float(scaling)
    adapted.omega[_ADAPTER] = float(omega)
    with torch.no_grad():
        adapted.lora_A[_ADAPTER].weight.copy_(A)
        adapted.lora_B[_ADAPTER].weight.copy_(B)
    return cast(nn.Module, adapted)


def _adapt(model: nn.Module, config: Any, adapter_dtype: torch.dtype) -> PeftModel:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    adapted = get_peft_model(cast(Any, model), config, autocast_adapter_dtype=False)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to(adapter_dtype)
            module.lora_B.to(adapter_dtype)
    return cast("PeftModel", adapted)


def _sine_config(
    rank: int, target_modules: str | list[str], *, alpha: float, bound: float | str
) -> Any:
    from transformers.pytorch_utils import Conv1D

    classes = _sine_classes()
    config = classes.config(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        use_sine=True,
        sine_bound=bound,
    )
    config._register_custom_module({nn.Linear: classes.layer, Conv1D: classes.layer})
    return config


@cache
def _sine_classes() -> _SineClasses:
    """PEFT's config and layer with the sine added; made on first use, as PEFT is slow to import."""
    import peft
    from peft import LoraConfig
    from peft.tuners.lora import layer as lora
    from transformers.pytorch_utils import Conv1D

    missing = [
        name
        for name, found in (
            ("LoraVariant", hasattr(lora, "LoraVariant")),
            ("Linear.lora_variants", hasattr(lora.Linear, "lora_variants")),
            ("Linear.resolve_lora_variant", hasattr(lora.Linear, "resolve_lora_variant")),
            ("LoraConfig._register_custom_module", hasattr(LoraConfig, "_register_custom_module")),
        )
        if not found
    ]
    if missing:
        raise RuntimeError(
            f"the unfused baseline needs {', '.join(missing)}, private parts of PEFT that PEFT "
            f"{peft.__version__} does not have; it is known to work with PEFT 0.21.2"
        )

    class SineVariant(lora.LoraVariant):
        """PEFT's LoRA forward pass with the sines of both factors in place of the factors."""

        @staticmethod
        def init(module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
            bound = config.sine_bound
            if isinstance(bound, str):
                bound = bound_of_weight(bound, module.get_base_layer().weight)
            module.scaling[adapter_name] = bound / module.r[adapter_name]
            module.omega[adapter_name] = math.sqrt(module.lora_alpha[adapter_name] / bound)

        @staticmethod
        def forward(
            module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
        ) -> Tensor:
            omega = module.omega[active_adapter]
            sin_A = torch.sin(omega * module.lora_A[active_adapter].weight)
            sin_B = torch.sin(omega * module.lora_B[active_adapter].weight)
            x = module.lora_dropout[active_adapter](x)
            return result + F.linear(F.linear(x, sin_A), sin_B) * module.scaling[active_adapter]

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
            orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    class SineLinear(lora.Linear):
        """`lora.Linear` with the sine variant; it also wraps transformers' Conv1D."""

        def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
            object.__setattr__(
                self, "omega", {}
            )  # read by SineVariant.init, inside super().__init__
            is_conv1d = isinstance(base_layer, Conv1D)
            super().__init__(base_layer, *args, is_target_conv_1d_layer=is_conv1d, **kwargs)
            self.fan_in_fan_out = is_conv1d

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {**super().lora_variants, ("use_sine",): SineVariant}

        def get_delta_weight(self, adapter: str) -> Tensor:
            """ΔW in fp32, in the layout of the base layer's weight."""
            omega = self.omega[adapter]
            sin_A = torch.sin(omega * self.lora_A[adapter].weight.float())
            sin_B = torch.sin(omega * self.lora_B[adapter].weight.float())
            delta = sin_B @ sin_A * self.scaling[adapter]
            return delta.T if self.fan_in_fan_out else delta

    @dataclass
    class SineConfig(LoraConfig):
        """`LoraConfig` plus the sine; `lora_alpha` keeps its meaning, the slope times rank."""

        use_sine: bool = field(default=False, metadata={"is_lora_variant": True})
        sine_bound: Any = None

    return _SineClasses(SineConfig, SineLinear)

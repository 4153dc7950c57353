"""FusedBoundedMLP: a transformers MLP block whose adapted projections run as one operator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbound.layers.base import Adapted, hooked, hooked_everywhere, transposed
from fastbound.layers.conversion import convert
from fastbound.layers.forms import Form, UnknownForm, activation_name, form_of
from fastbound.layers.linear import FusedBoundedLinear
from fastbound.layers.parts import adapted_parts, parts_obstacle
from fastbound.layers.settings import adapter_settings
from fastbound.operator.block_function import RECOMPUTE, bounded_mlp
from fastbound.truth.formula import Projection


@dataclass(frozen=True)
class Fusion:
    """What a block was before fusing: its class, and the form of that class's forward."""

    block_class: type[nn.Module]
    form: Form


class FusedBoundedMLP(nn.Module):
    """``down(f(gate(x)) * up(x))`` or ``down(f(up(x)))`` as one operator, any projections adapted.

    It has everything that the original block had, under the same names: the projections
    (`FusedBoundedLinear` if adapted, otherwise the plain layers), the activation, a dropout on the
    result, and other attributes. Parameters, state-dict keys and adapter files are the same as for
    the block with its layers adapted one by one.

    The forward of the original class runs instead, layer by layer, if the parts cannot run as one
    operator: a projection has hooks, was replaced, is quantised, sharded on its own or trained
    itself; the activation was replaced; hooks are set on all modules
    (`register_module_forward_hook`); or, in training, there is adapter dropout. :meth:`obstacle`
    and ``fastbound.explain`` name the reason.

    Parameters are read in this module's forward: a wrapper that gathers them must take this module
    or one around it as its unit (``fully_shard(block)`` or ``fully_shard(decoder_layer)``).

    Args:
        mlp: a block of a known form with at least one `FusedBoundedLinear` as a projection. It
            shares its parts with the new module and should not be used afterwards.
        recompute: None, or "gate_up" to save only x for backward and run the first GEMMs again
            there.

    Raises TypeError for a block that is already fused or has no known form, and ValueError for one
    whose parts cannot run as one operator.
    """

    fusion: Fusion
    recompute: str | None

    def __init__(self, mlp: nn.Module, *, recompute: str | None = None) -> None:
        form = _checked_form(mlp, recompute)
        reason = parts_obstacle(mlp, form)
        if reason is not None:
            raise ValueError(f"the {type(mlp).__name__} cannot be fused: {reason}")
        super().__init__()
        vars(self).update(_shell(mlp))
        self.fusion = Fusion(type(mlp), form)
        self.recompute = recompute

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        rank: int = 8,
        *,
        alpha: float | None = None,
        bound: float | str | None = "auto",
        dropout: float = 0.0,
        targets: Collection[str] | None = None,
        adapter_dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        form: str = "factors",
        omega: float | None = None,
        recompute: str | None = None,
    ) -> FusedBoundedMLP:
        """Adopt a plain block: share its parameters, freeze them and add new adapters.

        ``targets`` names the projections to adapt; None means all of them. The other arguments are
        those of `FusedBoundedLinear`; a bound such as "auto" is computed for each projection from
        its own weight. Raises as the class does, and ValueError for unknown targets or settings out
        of range; ``mlp`` is then unchanged.
        """
        block = _checked_form(mlp, recompute)
        chosen = block.projections if targets is None else tuple(targets)
        unknown = [name for name in chosen if name not in block.projections]
        if unknown or not chosen or isinstance(targets, str):
            raise ValueError(
                f"targets must be a list of projections, out of {', '.join(block.projections)}; "
                f"got {targets!r}"
            )
        reason = parts_obstacle(mlp, block, plain=True)
        if reason is not None:
            raise ValueError(f"the {type(mlp).__name__} cannot be fused: {reason}")
        settings = adapter_settings(
            rank, alpha, bound, dropout, adapter_dtype, backend, form, omega
        )
        trained = [p for p in mlp.parameters() if p.requires_grad]
        adapted = _with_class(type(mlp), _shell(mlp))
        convert(adapted, dict.fromkeys(chosen, settings))
        try:
            return cls(adapted, recompute=recompute)
        except ValueError:  # such as a rank too large for the block's kernels
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why the layers run one by one, or None if the block runs as one operator.

        ``gathered`` asks about the time of a forward, when FSDP2 has gathered its DTensors.
        """
        if hooked_everywhere():
            return "hooks are set on all modules, so that its projections must be called"
        reason = parts_obstacle(self, self.fusion.form, gathered=gathered)
        if reason is not None:
            return reason
        for layer in self.adapted_layers().values():
            if layer.adapter.training and layer.adapter.dropout:
                return f"adapter dropout {layer.adapter.dropout:g} in training"
        return None

    def adapted_layers(self) -> dict[str, Adapted]:
        """The adapted projections by name, first to last."""
        return adapted_parts(self, self.fusion.form)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., K']."""
        form = self.fusion.form
        if self.obstacle(gathered=True) is not None:
            return cast(Tensor, self.fusion.block_class.forward(self, x))
        up, down = self._projection(form.up), self._projection(form.down)
        gate = None if form.gate is None else up if form.packed else self._projection(form.gate)
        if form.packed:
            gate, up = _halves(up)
        y = bounded_mlp(
            x,
            up,
            down,
            gate,
            activation=cast(str, activation_name(getattr(self, form.activation))),
            recompute=self.recompute,
            backend=next(iter(self.adapted_layers().values())).adapter.backend,
        )
        for name in form.after:
            y = self._modules[name](y)  # type: ignore[misc]
        return y

    @torch.no_grad()
    def to_mlp(self, merge: bool = True) -> nn.Module:
        """A block of the original class with plain projections and everything else as it is here.

        ``merge`` means the same as for `FusedBoundedLinear.to_linear`, and the same errors are
        raised; they name the projection.
        """
        state = _shell(self)
        for name in ("fusion", "recompute", "_compiled_call_impl"):
            state.pop(name, None)
        for name in self.fusion.form.projections:
            layer = state["_modules"][name]
            if isinstance(layer, FusedBoundedLinear):
                try:
                    state["_modules"][name] = layer.to_linear(merge)
                except ValueError as error:
                    raise ValueError(f"{name} {error}") from None
        return _with_class(self.fusion.block_class, state)

    def extra_repr(self) -> str:
        recompute = "" if self.recompute is None else f", recompute={self.recompute!r}"
        return f"{self.fusion.block_class.__name__}: {self.fusion.form}{recompute}"

    def _projection(self, name: str) -> Projection:
        layer: Any = self._modules[name]
        weight = layer.weight.t() if transposed(layer) else layer.weight
        adapter = layer.adapter if isinstance(layer, Adapted) else None
        if adapter is None:
            return Projection(weight, layer.bias)
        return Projection(
            weight,
            layer.bias,
            adapter.A,
            adapter.B,
            adapter.scaling,
            adapter.omega,
            adapter.form,
        )


def obstacle(block: nn.Module, gathered: bool = False) -> str | None:
    """Why a block does not or cannot run as one operator; None if it does or can."""
    if isinstance(block, FusedBoundedMLP):
        return block.obstacle(gathered)
    try:
        return parts_obstacle(block, _readable_form(block))
    except UnknownForm as error:
        return str(error)


def _checked_form(mlp: nn.Module, recompute: str | None) -> Form:
    if recompute not in RECOMPUTE:
        raise ValueError(f'unknown recompute {recompute!r}: choose None or "gate_up"')
    if isinstance(mlp, FusedBoundedMLP):
        raise TypeError(
            f"the {mlp.fusion.block_class.__name__} is already fused: call to_mlp() first"
        )
    try:
        return _readable_form(mlp)
    except UnknownForm as error:
        raise TypeError(f"the {type(mlp).__name__} cannot be fused: {error}") from None


def _readable_form(block: nn.Module) -> Form:
    """The form of a block that a fused one can replace. Raises UnknownForm."""
    form = form_of(block)
    if hooked(block):
        raise UnknownForm("has forward or backward hooks, which a replacement would lose")
    if block._compiled_call_impl is not None:
        raise UnknownForm("was compiled in place: compile it after fusing")
    missing = [n for n in (*form.projections, *form.after) if block._modules.get(n) is None]
    if missing:
        raise UnknownForm(f"its {missing[0]} is not a module")
    return form


def _halves(packed: Projection) -> tuple[Projection, Projection]:
    """gate and up of a packed projection: views of its weight, bias and B, and the same A."""
    N = packed.weight.shape[0] // 2
    rows = (slice(0, N), slice(N, 2 * N))
    gate, up = (
        packed._replace(
            weight=packed.weight[half],
            bias=None if packed.bias is None else packed.bias[half],
            # Also a view: torch.compile does not take one tensor twice in an autograd.Function.
            A=None if packed.A is None else packed.A.view_as(packed.A),
            B=None if packed.B is None else packed.B[half],
        )
        for half in rows
    )
    return gate, up


def _shell(module: nn.Module) -> dict[str, Any]:
    """A copy of a module's attributes and registries, so that children can be replaced."""
    state = dict(vars(module))
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        state[name] = state[name].copy()
    return state


def _with_class(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    vars(module).update(state)
    return module

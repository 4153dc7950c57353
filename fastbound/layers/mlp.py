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
    """What a fused block was: its class, and the form of that class's forward."""

    block_class: type[nn.Module]
    form: Form


class FusedBoundedMLP(nn.Module):
    """``down(f(gate(x)) * up(x))`` or ``down(f(up(x)))`` as one operator, any projections adapted.

    It holds everything that the block it stands for held, under the same names: the projections
    (`FusedBoundedLinear` where adapted, else the plain layers), the activation, a dropout behind,
    other attributes. Parameters, state-dict keys and adapter files are those of the block with its
    layers adapted one by one.

    Where something other than plain layers has to run, a projection with hooks, one that was
    replaced, quantised, sharded on its own or is to be trained whole, an activation that was
    exchanged, hooks on all modules (`register_module_forward_hook`), and in training adapter
    dropout, the forward of the original class runs instead, layer by layer. :meth:`obstacle` names
    the reason, and so does ``fastbound.explain``.

    Parameters are read in this module's forward: a wrapper that gathers them must take this module
    or one around it as its unit (``fully_shard(block)`` or ``fully_shard(decoder_layer)``).

    Args:
        mlp: a block of a known form, at least one of its projections a `FusedBoundedLinear`. It
            shares its parts with the new module and is best dropped.
        recompute: None, or "gate_up" to save x alone and run the first GEMMs again in backward.

    Raises TypeError for a block that is fused already or of no known form, and ValueError for one
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
        """Adopt a plain block: the same parameters, frozen, no copy, and new adapters.

        ``targets`` names the projections to adapt, None all of them; the rest is as for
        `FusedBoundedLinear`, each projection with its own "auto" bound. When this raises, ``mlp``
        is as it was.
        """
        block = _checked_form(mlp, recompute)
        chosen = block.projections if targets is None else tuple(targets)
        unknown = [name for name in chosen if name not in block.projections]
        if unknown or not chosen or isinstance(targets, str):
            raise ValueError(
                f"targets must name some of the projections {', '.join(block.projections)}, "
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
        except ValueError:  # a rank that the block's kernels do not take
            for parameter in trained:
                parameter.requires_grad_(True)
            raise

    def obstacle(self, gathered: bool = False) -> str | None:
        """Why the layers run one by one, or None where the block runs as one operator.

        ``gathered`` asks for the time of a forward, when a unit of FSDP2 has gathered its DTensors.
        """
        if hooked_everywhere():
            return "hooks are set on all modules, and must see its projections called"
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
        """A block of the original class with plain projections, and everything else as it is here.

        ``merge`` as for `FusedBoundedLinear.to_linear`, and so is what is raised, which names the
        projection.
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
    """Why a block does not run as one operator, or why it cannot; None where nothing stands so."""
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
            f"the {mlp.fusion.block_class.__name__} is fused already: call to_mlp() first"
        )
    try:
        return _readable_form(mlp)
    except UnknownForm as error:
        raise TypeError(f"the {type(mlp).__name__} cannot be fused: {error}") from None


def _readable_form(block: nn.Module) -> Form:
    """The form of a block that a fused one can take the place of. Raises UnknownForm."""
    form = form_of(block)
    if hooked(block):
        raise UnknownForm("has forward or backward hooks, which a replacement would lose")
    if block._compiled_call_impl is not None:
        raise UnknownForm("was compiled in place: compile after fusing")
    missing = [n for n in (*form.projections, *form.after) if block._modules.get(n) is None]
    if missing:
        raise UnknownForm(f"its {missing[0]} is no module")
    return form


def _halves(packed: Projection) -> tuple[Projection, Projection]:
    """gate and up of a packed projection: views of weight, bias and B, and the same A."""
    N = packed.weight.shape[0] // 2
    rows = (slice(0, N), slice(N, 2 * N))
    gate, up = (
        packed._replace(
            weight=packed.weight[half],
            bias=None if packed.bias is None else packed.bias[half],
            # A view, too: torch.compile takes no tensor twice into one autograd.Function.
            A=None if packed.A is None else packed.A.view_as(packed.A),
            B=None if packed.B is None else packed.B[half],
        )
        for half in rows
    )
    return gate, up


def _shell(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with registries of their own: children can be exchanged."""
    state = dict(vars(module))
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        state[name] = state[name].copy()
    return state


def _with_class(kind: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    vars(module).update(state)
    return module

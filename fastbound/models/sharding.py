"""FSDP2 over an adapted model: what its units are, and what must hold before they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastbound.layers.adapter import BoundedAdapter
from fastbound.models.adapted import adapted_blocks
from fastbound.operator.partition import partition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    model: nn.Module, mesh: DeviceMesh | None = None, *, reshard_after_forward: bool = True
) -> nn.Module:
    """Spread the parameters of an adapted model over the processes of `mesh`, in place (FSDP2).

    Units of `fully_shard` are the decoder layers (transformers' `_no_split_modules`), in another
    model the modules that hold adapted layers, and then the model itself. So a fused block runs as
    one operator: it reads W, A and B of all its projections in its own forward, and the unit around
    it has gathered them by then.

    Parameters are gathered in the dtype they are stored in: the frozen weights as the model was
    loaded, A and B as fp32 unless `adapter_dtype` said otherwise. There is no `param_dtype` here: a
    `MixedPrecisionPolicy` with one would round A and B to it before the sine is taken. To compute
    in bf16, load the model in bf16 or use autocast. Gradients are summed in the dtype of A and B.

    The parameters are new objects afterwards: make the optimizer from those. `save_adapter` and
    `load_adapter` take the result when all processes call them.

    Args:
        mesh: of one dimension, or of two to shard within groups and copy across; None: all
            processes in one dimension.
        reshard_after_forward: drop a layer's gathered parameters after its forward and gather them
            again in backward; False keeps them: more memory, less traffic.

    Returns:
        The model itself.

    Raises ValueError, before anything is changed, for a model without adapters, with parameters
    that are spread over processes already or on the meta device, or with trained parameters of
    several dtypes.
    """
    from torch.distributed.fsdp import fully_shard

    if not any(isinstance(module, BoundedAdapter) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds no adapter: call fastbound.inject first")
    for name, parameter in model.named_parameters():
        spread = partition(parameter)
        if spread is not None:
            raise ValueError(f"{name} {spread} already: shard a model once, while it is whole")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model before sharding it")
    trained = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) > 1:
        found = " and ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        raise ValueError(f"FSDP2 wants trained parameters of one dtype, got {found}: cast them")
    for unit in _units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    return model


def _units(model: nn.Module) -> list[nn.Module]:
    """Without the model itself; an inner one before the one around it."""
    layers = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in layers]
    if not found:
        found = list(adapted_blocks(model).values())
    return [module for module in reversed(found) if module is not model]

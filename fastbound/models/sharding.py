"""FSDP2 for an adapted model: its units, and the checks before they are made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastbound.layers.adapter import BoundedAdapter
from fastbound.models.adapted import adapted_blocks
from fastbound.operator.partition import partition

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    model: nn.Module, mesh: DeviceMesh | None = None, *, reshard_after_forward: bool = True
) -> nn.Module:
    """Shard the parameters of an adapted model over the processes of `mesh`, in place (FSDP2).

    `fully_shard` is applied to each decoder layer (transformers' `_no_split_modules`; in other
    models to each module that holds adapted layers) and then to the model itself. A fused block
    still runs as one operator: it reads W, A and B of all its projections in its own forward, when
    the unit around it has gathered them.

    Parameters are gathered in the dtype in which they are stored: the frozen weights as the model
    was loaded, A and B as fp32 unless `adapter_dtype` said otherwise. There is no `param_dtype`
    argument, because a `MixedPrecisionPolicy` with one would round A and B before the sine is
    taken. To compute in bf16, load the model in bf16 or use autocast. Gradients are reduced in the
    dtype of A and B.

    The parameters are new objects afterwards, so create the optimizer after this call.
    `save_adapter` and `load_adapter` accept the result if all processes call them.

    Args:
        mesh: one-dimensional, or two-dimensional to shard within groups and replicate across them
            (the replicas take the trained parameters of the first); None means all processes in
            one dimension.
        reshard_after_forward: free a layer's gathered parameters after its forward and gather them
            again in backward. False keeps them, which takes more memory and less communication.

    Returns:
        The model itself.

    Raises ValueError, before anything is changed, for a model without adapters, with parameters
    that are already sharded or on the meta device, or with trained parameters of several dtypes,
    for a two-dimensional mesh without `mesh_dim_names`, and in a process that no launcher started.
    """
    from torch.distributed.fsdp import fully_shard

    if not any(isinstance(module, BoundedAdapter) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds no adapter: call fastbound.inject first")
    for name, parameter in model.named_parameters():
        spread = partition(parameter)
        if spread is not None:
            raise ValueError(f"{name} {spread} already: call shard once, on an unsharded model")
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model before sharding it")
    trained = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) > 1:
        found = " and ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        raise ValueError(
            f"FSDP2 needs all trained parameters to have one dtype, got {found}: cast them"
        )
    if mesh is None and not (torch.distributed.is_initialized() or "RANK" in os.environ):
        raise ValueError(
            "shard needs the processes of a launcher: start with torchrun or accelerate launch"
        )
    if mesh is not None and mesh.ndim == 2:
        if mesh.mesh_dim_names is None:
            raise ValueError(
                "the two-dimensional mesh has no names: give init_device_mesh "
                'mesh_dim_names=("replicate", "shard")'
            )
        _take_from_first_replica(model, mesh)
    for unit in _units(model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
    return model


def _take_from_first_replica(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every replica the trained parameters of the first.

    `inject` draws A from each process's own generator, and FSDP2 broadcasts nothing: replicas would
    average the gradients of different adapters.
    """
    import torch.distributed as distributed

    group = mesh.get_group(0)
    first = distributed.get_global_rank(group, 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            held = parameter.data.to(mesh.device_type)
            distributed.broadcast(held, first, group=group)
            parameter.data.copy_(held)


def _units(model: nn.Module) -> list[nn.Module]:
    """The units inside the model, without the model itself; inner modules before outer ones."""
    layers = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in layers]
    if not found:
        found = list(adapted_blocks(model).values())
    return [module for module in reversed(found) if module is not model]

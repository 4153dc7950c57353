"""Compile and measure in advance what a model's first training steps would otherwise wait for."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastbound.dispatch.device import Device, describe
from fastbound.errors import counted
from fastbound.layers.base import Adapted, layout_of, weight_shape
from fastbound.layers.forms import activation_name
from fastbound.layers.mlp import FusedBoundedMLP
from fastbound.models.explanation import Explanation, LayerExplanation, calls_base, explain
from fastbound.operator.call import autocast_to
from fastbound.operator.partition import partition
from fastbound.performance.compilation import binary_of, compile_launch
from fastbound.performance.recorder import block_calls, layer_calls

COMPILE_SECONDS = 300.0
WORKERS = 12


@dataclass(frozen=True)
class Calls:
    """A layer or block and a strategy, whose launches another process is to compile."""

    device: Device
    M: int
    N: int
    K: int
    ranks: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    bias: bool
    block: tuple[str, bool] | None = None  # activation, gated
    form: str = "factors"
    layout: str = "rows"
    adapter_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    over_base: bool = False


def warmup(model: nn.Module, tokens: int | Iterable[int] = 4096) -> Explanation:
    """Compile every kernel and make every choice that the model's calls of ``tokens`` rows need.

    Kernels are compiled first, by several processes in parallel. Then every adapted layer and block
    of a distinct shape runs forward and backward once on noise. This leaves the model's gradients
    and hooks and the state of random generators untouched. Under torch.distributed all processes
    must call this: the one with local rank 0 measures, and the others then read its choices.

    Args:
        model: with adapters, on the device and in the dtype of the training. If you train under
            autocast, call this under autocast too.
        tokens: rows of x per call (batch size times sequence length): one number or several.

    Returns:
        What `fastbound.explain` reports afterwards for the largest number of rows.

    Raises:
        ValueError: tokens is empty or holds something else than integers from 1 on, the model has
            no bounded layers, or a part of it is on the meta device.
    """
    given = tokens if isinstance(tokens, Iterable) and not isinstance(tokens, str) else [tokens]
    rows = sorted({counted("tokens", each) for each in given})
    if not rows:
        raise ValueError("tokens must have at least one number of rows, got none")
    explained = [explain(model, M) for M in rows]
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("part of the model is on the meta device: load its weights first")
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not spread:
        _compile(model, explained)
        _run(model, rows)
        return explain(model, rows[-1])
    try:
        if first:
            _compile(model, explained)
            _run(model, rows)
    finally:
        torch.distributed.barrier()
    if not first:
        _run(model, rows)
    return explain(model, rows[-1])


def _run(model: nn.Module, rows: Iterable[int]) -> None:
    for M in rows:
        done: set[Any] = set()
        for module in _distinct(model):
            kind = _kind(module)
            if kind not in done:
                done.add(kind)
                _once(module, M)


def _distinct(model: nn.Module) -> Iterator[nn.Module]:
    """All blocks and all running adapted layers; those inside a block may run on their own."""
    for module in model.modules():
        runs = isinstance(module, Adapted) and module.running()
        if runs or isinstance(module, FusedBoundedMLP):
            yield module


def _kind(module: Any) -> tuple[Any, ...]:
    """The kind of a module; modules of the same kind make the same calls."""
    tensors = [(n, tuple(p.shape), p.dtype, p.device) for n, p in module.named_parameters()]
    layers = [m for m in module.modules() if isinstance(m, Adapted)]
    adapters = [(a.form, a.backend, a.dropout, a.training) for m in layers for a in m.running()]
    return type(module), tuple(tensors), tuple(adapters), getattr(module, "recompute", None)


def _once(module: Any, M: int) -> None:
    """Run a module's forward and backward once on noise, without its hooks."""
    if isinstance(module, FusedBoundedMLP):
        if module.obstacle() is not None:
            return  # its layers run one by one
        layer: Any = module.get_submodule(module.fusion.form.up)
        K, held = weight_shape(layer)[1], layer.weight
    else:
        K, held = module.in_features, module.weight
        if not (isinstance(held, torch.Tensor) and held.is_floating_point()):
            held = module.running()[0].A  # over a quantised base
    if partition(held) is not None:
        return  # only the forward of its FSDP unit gathers it
    dtype, device = held.dtype, held.device
    dtype = autocast_to(dtype, device) or dtype
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        x = torch.randn(M, K, device=device, dtype=dtype, requires_grad=True)
        trained = [p for p in module.parameters() if p.requires_grad]
        if isinstance(module, Adapted) and calls_base(module):
            y = _terms(module, x)
        else:
            y = type(module).forward(module, x)
        torch.autograd.grad(y, [x, *trained], torch.randn_like(y), allow_unused=True)


def _terms(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The low-rank terms, added to noise in place of the base's result: the base is not called.

    It may have hooks, or a state that a call changes.
    """
    y = x.new_empty(len(x), layer.out_features).normal_()
    for adapter in layer.running():
        y = adapter.add_to(y, x)
    return y


def _compile(model: nn.Module, explained: Iterable[Explanation], workers: int = WORKERS) -> None:
    """Compile the candidates' launches into Triton's cache, by several processes in parallel.

    What they do not finish, the first call compiles, and drops candidates that fail. The processes
    are not started by multiprocessing, which would run a user's script again if it has no guard.
    """
    tasks = list(dict.fromkeys(t for one in explained for t in _tasks(model, one)))
    count = min(workers, os.cpu_count() or 1, len(tasks))
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    here.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, env=here, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    deadline = time.monotonic() + COMPILE_SECONDS
    try:
        for i, process in enumerate(running):
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(pickle.dumps(tasks[i::count]))
                    process.stdin.close()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in running:
            process.kill()
            process.wait()


def serve() -> None:
    """Compile the tasks on standard input; a task that fails is left to the first call."""
    for task in pickle.load(sys.stdin.buffer):
        with contextlib.suppress(Exception):
            compile_calls(task)


def compile_calls(task: Calls) -> int:
    """Compile the distinct kernels of a task, and return their number."""
    sizes = (task.device, task.M, task.N, task.K)
    names = ("backend", "bias", "form", "layout", "adapter_dtype")
    settings: dict[str, Any] = {name: getattr(task, name) for name in names}
    if task.block is None:
        settings |= {"dropout": task.dropout, "over_base": task.over_base}
        made = layer_calls(*sizes, task.ranks[0], task.dtype, **settings)
    else:
        activation, gated = task.block
        settings |= {"activation": activation, "gated": gated}
        made = block_calls(*sizes, task.ranks, task.dtype, **settings)
    distinct = {binary_of(launch, task.device): launch for launch in made.launches}
    for launch in distinct.values():
        compile_launch(launch, task.device)
    return len(distinct)


def _tasks(model: nn.Module, explanation: Explanation) -> Iterator[Calls]:
    rows = {row.layer: row for row in explanation}
    make: Callable[..., Calls]
    for name, module in model.named_modules():
        if isinstance(module, FusedBoundedMLP):
            make, inside = _block_calls, next(iter(module.adapted_layers()), None)
            row = None if inside is None else rows.get(f"{name}.{inside}" if name else inside)
            if row is None or row.block is None:
                continue
        elif isinstance(module, Adapted) and rows[name].block is None:
            make, row = _layer_calls, rows[name]
        else:
            continue
        device = describe(next(module.parameters()).device)
        if device.architecture == "interpreter":
            continue
        plans = [p for p in (row.plan, row.backward) if p is not None and p.tiles is not None]
        strategies = {name for plan in plans for name in (plan.strategy, *plan.candidates)}
        dtype = getattr(torch, row.dtype.removeprefix("torch."))
        for backend in sorted(strategies - {"torch", "layers"}):
            yield make(module, row, device, explanation.tokens, dtype, backend)


def _block_calls(
    block: Any, row: LayerExplanation, device: Device, M: int, dtype: torch.dtype, backend: str
) -> Calls:
    form, adapters = block.fusion.form, {n: m.adapter for n, m in block.adapted_layers().items()}
    first = (form.up, form.up) if form.packed else (form.gate, form.up)
    names = [name for name in (*first, form.down) if name is not None]
    ranks = tuple(adapters[name].rank if name in adapters else 0 for name in names)
    activation = cast(str, activation_name(getattr(block, form.activation)))
    layer = block.get_submodule(form.up)
    N, K = weight_shape(layer)
    return Calls(
        *(device, M, N // 2 if form.packed else N, K, ranks, dtype, backend),
        bias=layer.bias is not None,
        block=(activation, form.gate is not None),
        form=row.form,
        layout=layout_of(layer),
        adapter_dtype=next(iter(adapters.values())).A.dtype,
    )


def _layer_calls(
    layer: Any, row: LayerExplanation, device: Device, M: int, dtype: torch.dtype, backend: str
) -> Calls:
    running = layer.running()
    return Calls(
        *(device, M, *row.shape, (row.rank,), dtype, backend),
        bias=layer.bias is not None,
        form=row.form,
        layout=layout_of(layer),
        adapter_dtype=running[0].A.dtype,
        dropout=max(each.dropout if each.training else 0.0 for each in running),
        over_base=calls_base(layer),
    )

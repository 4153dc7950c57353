"""Which engine computes a call's products: each key has one cached route, chosen on first use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from fastbound.dispatch import first_use
from fastbound.dispatch.choices import Choice
from fastbound.dispatch.device import Device
from fastbound.dispatch.first_use import Trial, Unmeasurable
from fastbound.dispatch.plan import PLANNING, Plan, PlanKey, place_of, plan_for
from fastbound.dispatch.tables import row_bucket, table_for
from fastbound.operator.autograd import nothing_intercepts
from fastbound.operator.torch_engine import TorchEngine

if TYPE_CHECKING:
    from fastbound.operator.triton_engine import TritonEngine

Engine: TypeAlias = "TorchEngine | TritonEngine"


class Route:
    """The path that all calls of one key take in this process, and why.

    ``engine`` is None until the first call has chosen it (:meth:`decide`). Afterwards it changes
    only if a Triton launch fails, and then to PyTorch's engine.
    """

    __slots__ = ("_lock", "_place", "engine", "key", "plan")

    def __init__(self, key: PlanKey, plan: Plan) -> None:
        self.key, self.plan, self._place = key, plan, place_of(key, plan)
        self.engine = None if plan.candidates else self._answering(plan)
        self._lock = threading.Lock()

    def decide(self, trial: Callable[[], Trial]) -> Engine:
        """The engine: found on disk, measured now, or the default if nothing can be measured."""
        with self._lock:
            if self.engine is None and self._recall() is None:
                store = first_use.store_for(self._device)
                try:
                    # Before the trial, which reads from the device: that would end a capture.
                    first_use.require_measurable(self._device)
                    with _unseen():
                        asked = (self._place, trial(), self.plan.candidates, store.card.name)
                        choice = first_use.measured(*asked)
                except Unmeasurable as obstacle:
                    self._settle(self.plan.strategy, f"not measured, as {obstacle}")
                else:
                    first_use.warn_of(choice)
                    store.keep(choice)
                    self._settle(choice.strategy, choice.reason)
        if self.engine is None:
            raise RuntimeError(f"fastbound: {self.key} was left without an engine")
        return self.engine

    def explained(self) -> Plan:
        """The plan, with the choice of an earlier process if there is one."""
        if self.engine is None:
            with self._lock:
                self._recall()
        if self.engine is not None:
            return self.plan
        others = " and ".join(f'"{name}"' for name in self.plan.candidates[1:])
        later = f'the first call times "{self.plan.candidates[0]}" against {others}'
        return replace(self.plan, reason=f"{self.plan.reason}; not measured yet: {later}")

    @property
    def _device(self) -> torch.device:
        device = self.key.device
        if isinstance(device, Device):
            raise TypeError(f"{device} is not in this machine: nothing can be measured on it")
        return device

    def _recall(self) -> Choice | None:
        if self.engine is not None:
            return None
        choice = first_use.store_for(self._device).find(self._place)
        if choice is not None:
            self._settle(choice.strategy, choice.reason)
        return choice

    def _settle(self, strategy: str, reason: str) -> None:
        self.plan = self.plan.by(strategy, f"{reason}; {self.plan.reason}")
        self.engine = self._answering(self.plan)

    def _answering(self, plan: Plan) -> Engine:
        """The plan's engine; if "auto" chose Triton, one that survives a failed launch."""
        engine = engine_of(plan)
        if plan.tiles is None or self.key.backend != "auto":
            return engine
        return cast("Engine", Answering(engine, self._let_go))

    def _let_go(self, why: str) -> None:
        """Use PyTorch's products from now on, and in later processes if this key was measured."""
        with self._lock:
            failed = self.plan.strategy
            self.plan = self.plan.by("torch", f'"{failed}" does not run here ({why})')
            self.engine = engine_of(self.plan)
            first_use.let_go(self.key.device, self._place, failed, why)


@contextmanager
def _unseen() -> Iterator[None]:
    """Hide the trial from hooks around the user's call, such as those of activation checkpointing.

    Raises Unmeasurable if something else would see it.
    """
    if not nothing_intercepts():
        raise Unmeasurable("something intercepted the call: a compiler, a mode or a transform")
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        raise Unmeasurable("a torch.func transform was active")
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        yield


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_planning = "measured"
_routes: dict[tuple[Any, ...], Route] = {}


@lru_cache(maxsize=16384)
def route_for(*key: Any) -> Route:
    """The route of a :class:`PlanKey`, given field by field because making a key is slow."""
    asked = PlanKey(*key)
    plan = plan_for(asked, _planning)
    bucket = asked._replace(M=row_bucket(asked.M))
    return _routes.setdefault((bucket, plan.strategy, plan.candidates), Route(asked, plan))


def routes() -> tuple[Route, ...]:
    """All routes of this process, in the order of their first calls."""
    return tuple(_routes.values())


def set_planning(planning: str) -> None:
    """Set whether the first call of a shape may measure which kernels are fastest.

    Args:
        planning: "measured", the default, or "fixed".

    With "measured", the first call of a shape with 512 or more rows times the candidates of
    backend "auto" on this device, as ``torch.backends.cudnn.benchmark`` does, and saves the choice
    to disk. With "fixed" nothing is measured, and no earlier measurement of this machine is read,
    so all machines with the same device and software give the same bits.

    The setting holds for this process, and later calls are planned anew.

    Raises:
        ValueError: ``planning`` is neither "measured" nor "fixed".
    """
    global _planning
    if planning not in PLANNING:
        raise ValueError(f"planning must be one of {', '.join(PLANNING)}, got {planning!r}")
    _planning = planning
    forget()


def forget() -> None:
    """Forget all routes, tables and choices of this process; files are kept."""
    route_for.cache_clear()
    _routes.clear()
    table_for.cache_clear()
    first_use.forget()


class Answering:
    """Triton's products, replaced by PyTorch's from the first launch that fails.

    ``let_go`` is called once with the reason. Running out of memory does not count as a failure.
    """

    def __init__(self, engine: Engine, let_go: Callable[[str], None]) -> None:
        self.plan = engine.plan
        self._failed = False
        self._let_go = let_go
        other = TorchEngine(engine.plan)
        for name in PRODUCTS:
            setattr(self, name, self._either(getattr(engine, name), getattr(other, name)))

    def _either(self, triton: Callable[..., Any], torch_: Callable[..., Any]) -> Callable[..., Any]:
        def product(*arguments: Any, **named: Any) -> Any:
            if self._failed:
                return torch_(*arguments, **named)
            try:
                return triton(*arguments, **named)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                made = torch_(*arguments, **named)  # raises if the caller made a mistake
                self._failed = True
                lines = str(error).strip().splitlines()
                self._let_go(f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])
                return made

        return product


PRODUCTS = tuple(
    name for name, made in vars(TorchEngine).items() if callable(made) and not name.startswith("_")
)


def engine_of(plan: Plan) -> Engine:
    """PyTorch's engine, or Triton's with the plan's tiles."""
    if plan.tiles is None:
        return TorchEngine(plan)
    from fastbound.operator.triton_engine import TritonEngine  # Triton is optional

    return TritonEngine(plan)

"""disable_adapter: for the thread or task that enters it, and for the threads that work for it."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastbound
from fastbound import FusedBoundedMLP
from tests.support.models import Gated, stir


class Own(nn.Linear):
    """A subclass, which is called itself."""


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6))


def over_a_base() -> nn.Module:
    return nn.Sequential(Own(6, 6))


def block() -> nn.Module:
    return nn.Sequential(FusedBoundedMLP.from_mlp(Gated(), 2))


@pytest.fixture(params=[layer, over_a_base, block])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = request.param()
    if request.param is not block:
        fastbound.inject(made, 2, target_modules=["0"])
    stir(made)
    return made


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def elsewhere(run: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_keeps_its_adapters(model: nn.Module) -> None:
    adapted = model(X)
    with fastbound.disable_adapter(model):
        bare = model(X)
        assert torch.equal(elsewhere(lambda: model(X)), adapted)
        with fastbound.disable_adapter(model):
            assert torch.equal(model(X), bare)
        assert torch.equal(model(X), bare)
    assert torch.equal(model(X), adapted) and not torch.equal(bare, adapted)


def test_threads_that_come_and_go_leave_it_as_it_was(model: nn.Module) -> None:
    adapted, bare = model(X), None
    with fastbound.disable_adapter(model):
        bare = model(X)
    wrong: list[str] = []

    def work(disable: bool) -> None:
        for _ in range(30):
            if disable:
                with fastbound.disable_adapter(model):
                    right = torch.equal(model(X), bare)
            else:
                right = torch.equal(model(X), adapted)
            if not right:
                wrong.append("disabled" if disable else "enabled")

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(model(X), adapted)


def test_a_thread_with_the_callers_context_is_disabled_with_it(model: nn.Module) -> None:
    with fastbound.disable_adapter(model):
        bare = model(X)
        context = contextvars.copy_context()
        assert torch.equal(elsewhere(lambda: context.run(model, X)), bare)


def test_tasks_of_one_thread_have_their_own(model: nn.Module) -> None:
    adapted = model(X)

    async def reference(entered: asyncio.Event, done: asyncio.Event) -> Tensor:
        with fastbound.disable_adapter(model):
            entered.set()
            await done.wait()
            return model(X)

    async def both() -> tuple[Tensor, Tensor]:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(reference(entered, done))
        await entered.wait()
        here = model(X)
        done.set()
        return here, await task

    here, there = asyncio.run(both())
    assert torch.equal(here, adapted) and not torch.equal(there, adapted)


def test_a_checkpoint_is_run_again_as_it_was_run(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    with fastbound.disable_adapter(model):
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, expected)


def test_replicas_of_data_parallel_are_disabled_with_the_layer() -> None:
    original = fastbound.FusedBoundedLinear(6, 6, 2)
    stir(original)
    with fastbound.disable_adapter(original):
        replica = original._replicate_for_data_parallel()
        replica.weight, replica.bias = original.weight.detach(), original.bias.detach()
        assert torch.equal(elsewhere(lambda: replica(X)), original(X))


def test_a_compiled_model_is_disabled_and_enabled_again(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    adapted = compiled(X)
    with fastbound.disable_adapter(model):
        torch.testing.assert_close(compiled(X), model(X))
    torch.testing.assert_close(compiled(X), adapted)
    torch.compiler.reset()


def test_an_error_inside_enables_it_again(model: nn.Module) -> None:
    adapted = model(X)
    with pytest.raises(KeyError), fastbound.disable_adapter(model):
        raise KeyError("inside")
    assert torch.equal(model(X), adapted)

"""warmup: every choice is made, nothing of the model is touched, and the first process leads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fastbound.kernels.launch import Launch, recorded
from transformers.pytorch_utils import Conv1D

import fastbound
from fastbound.dispatch.device import Device
from fastbound.layers.over_base import BoundedOverBase
from fastbound.operator import engine
from fastbound.performance import warming
from fastbound.performance.compilation import binary_of
from fastbound.performance.inspection import kernel_name
from fastbound.performance.recorder import layer_calls
from fastbound.performance.warming import Calls, compile_calls, warmup
from tests.support.first_use import Clock, measuring
from tests.support.models import Gated, Packed, Plain


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = [Gated(K=16, N=24), Gated(K=16, N=24), torch.nn.Linear(16, 8)]
    model = torch.nn.Sequential(*blocks)
    fastbound.inject(model, rank=4, target_modules="all-linear")
    return model


def test_every_shape_is_measured_once_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    model, called = a_model(), []
    for module in model.modules():
        if module is not model[0]:
            module.register_forward_hook(lambda *_: called.append(1)) if module is model[
                2
            ] else None
    before = {name: p.clone() for name, p in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with measuring(tmp_path, Clock(layers=0.5)) as clock:
        explained = warmup(model, [512, 2048])
        assert clock.asked == [("block", "layers")] * 2  # for each number of rows
        assert explained.tokens == 2048 and "layers 500 ms" in str(explained)
        model(torch.randn(512, 16)).sum().backward()
        assert len(clock.asked) == 2
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_no_gradient_and_no_hook_sees_it() -> None:
    model, called = a_model(), []
    model[2].register_forward_hook(lambda *_: called.append(1))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    warmup(model, 3)
    assert torch.equal(torch.get_rng_state(), state) and not called
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_first_process_of_a_machine_measures_and_the_others_read(
    local_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(warming, "_run", lambda *_: done.append("run"))
    warmup(a_model(), 3)
    assert done == (["run", "barrier"] if local_rank == "0" else ["barrier", "run"])


def test_the_others_are_let_go_when_the_first_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(warming, "_run", mock.Mock(side_effect=torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        warmup(a_model(), 3)
    assert done == ["barrier"]


def test_a_base_that_is_called_for_its_result_is_not_called_with_noise() -> None:
    model = torch.nn.Sequential(
        torch.nn.utils.spectral_norm(torch.nn.Linear(16, 24)), torch.nn.Linear(24, 16)
    )
    model[1].register_forward_hook(lambda *_: pytest.fail("the hook saw noise"))
    fastbound.inject(model, rank=4, target_modules="all-linear", bound=0.01)
    before = copy.deepcopy(model.state_dict())
    warmup(model.train(), np.int64(64))
    after = model.state_dict()
    assert all(torch.equal(after[name], held) for name, held in before.items())


def test_bad_input_is_named() -> None:
    for tokens, said in (
        (0, "tokens must be an integer >= 1, got 0"),
        (2.0, "tokens must be an integer >= 1, got 2.0"),
        ("4k", "tokens must be an integer >= 1, got '4k'"),
        ([True], "tokens must be an integer >= 1, got True"),
        ([], "must have at least one number of rows"),
    ):
        with pytest.raises(ValueError, match=said):
            warmup(a_model(), tokens)
    with pytest.raises(ValueError, match="no bounded adapter in this model"):
        warmup(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="on the meta device"):
        warmup(fastbound.FusedBoundedLinear(4, 4, 2, device="meta"))


@contextmanager
def planned(device: Device, folder: Path) -> Iterator[None]:
    """Plan and warm up as on a GPU that is not there."""
    with (
        measuring(folder, Clock(), device),
        mock.patch("fastbound.performance.warming.describe", lambda _: device),
    ):
        yield


def test_what_would_be_compiled_is_what_the_candidates_launch(tmp_path: Path) -> None:
    """One task for each shape and strategy, of a block one for all of its layers."""
    model = a_model().bfloat16()
    device = Device("sm_90", 132)
    with planned(device, tmp_path):
        found = list(warming._tasks(model, fastbound.explain(model, 512)))
    block = (device, 512, 24, 16, (4, 4, 4), torch.bfloat16, "split", True, ("silu", True))
    layer = (device, 512, 8, 16, (4,), torch.bfloat16, "split", True, None)
    expected = [Calls(*each, adapter_dtype=torch.bfloat16) for each in (block, layer)]
    assert dict.fromkeys(found) == dict.fromkeys(expected)
    engine.forget()


def compiled(model: torch.nn.Module, device: Device, folder: Path) -> dict[Any, Launch]:
    """Every binary that a warm-up compiles for the model on a GPU that is not there."""
    found: dict[Any, Launch] = {}

    def kept(launch: Launch, on: Device) -> None:
        found[binary_of(launch, on)] = launch

    with planned(device, folder), mock.patch.object(warming, "compile_launch", kept):
        for task in warming._tasks(model, fastbound.explain(model, 512)):
            compile_calls(task)
    engine.forget()
    return found


@pytest.mark.parametrize("over_base", [False, True])
def test_the_kernels_of_dropout_are_compiled_in_training(over_base: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    device = Device("sm_90", 132)
    layer = torch.nn.Linear(512, 1024, dtype=torch.bfloat16)
    if over_base:
        layer.register_forward_hook(lambda *_: None)
    model = torch.nn.Sequential(layer)
    fastbound.inject(model, rank=8, dropout=0.1, target_modules="all-linear")
    assert isinstance(model[0], BoundedOverBase) == over_base
    sizes = (device, 512, 1024, 512, 8, torch.bfloat16)
    expected = layer_calls(*sizes, backend="split", dropout=0.1, bias=True, over_base=over_base)
    needed = {binary_of(launch, device) for launch in expected.launches}
    assert needed <= compiled(model.train(), device, tmp_path).keys()
    assert any(kernel_name(one) == "keep" for one in expected.launches)
    evaluated = compiled(model.eval(), device, tmp_path).values()
    assert evaluated and not any(kernel_name(one) == "keep" for one in evaluated)


def launched(model: torch.nn.Module, K: int, device: Device) -> dict[Any, Launch]:
    """Every binary that forward and backward over 512 rows launch on that GPU; none is run."""
    x = torch.randn(512, K, dtype=torch.bfloat16, requires_grad=True)
    with mock.patch("fastbound.dispatch.plan.describe", lambda *_: device), recorded() as launches:
        model(x).float().sum().backward()
    engine.forget()
    return {binary_of(launch, device): launch for launch in launches}


def conv1d(K: int, N: int) -> torch.nn.Module:
    return Conv1D(N, K)


def packed(K: int, N: int) -> torch.nn.Module:
    block = Packed()
    block.both, block.down = torch.nn.Linear(K, 2 * N), torch.nn.Linear(N, K)
    return block


def conv1d_block(K: int, N: int) -> torch.nn.Module:
    block = Plain(K=K, N=N)
    block.first, block.last = conv1d(K, N), conv1d(N, K)
    return block


MODULES: dict[str, Callable[[int, int], torch.nn.Module]] = {
    "linear": torch.nn.Linear,
    "Conv1D": conv1d,
    "gated block": lambda K, N: Gated(K=K, N=N),
    "packed block": packed,
    "plain block": lambda K, N: Plain(K=K, N=N),
    "Conv1D block": conv1d_block,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fused": {"backend": "fused"},
    "split": {"backend": "split"},
    "bf16 factors": {"backend": "fused", "adapter_dtype": torch.bfloat16},
    "dropout": {"backend": "split", "dropout": 0.1},
    "product": {"backend": "split", "form": "product"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_what_a_model_launches_has_been_compiled(
    module: Callable[[int, int], torch.nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    K, device = 256, Device("sm_90", 132)
    model = torch.nn.Sequential(module(K, 512).bfloat16())
    fastbound.inject(model, rank=8, bound=0.01, target_modules="all-linear", **settings)
    ran = launched(model.train(), K, device)
    assert ran and ran.keys() <= compiled(model, device, tmp_path).keys()


@pytest.mark.parametrize(("forward", "backward"), [("torch", "split"), ("split", "torch")])
def test_what_one_direction_alone_needs_is_compiled(
    forward: str, backward: str, tmp_path: Path
) -> None:
    device = Device("sm_90", 132)
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024, dtype=torch.bfloat16))
    fastbound.inject(model, rank=8, target_modules="all-linear")
    with planned(device, tmp_path):
        explained = fastbound.explain(model, 512)
        row = explained.layers[0]
        plan = replace(row.plan, candidates=())
        row = replace(row, plan=plan.by(forward), backward=plan.by(backward))
        tasks = list(warming._tasks(model, replace(explained, layers=(row,))))
    assert [task.backend for task in tasks] == ["split"]
    engine.forget()


@pytest.mark.slow  # compiles
def test_processes_compile_what_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    task = Calls(Device("sm_90", 132), 512, 256, 256, (8,), torch.bfloat16, "split", False)
    with mock.patch.object(warming, "_tasks", lambda *_: iter([task])):
        warming._compile(torch.nn.Identity(), [None], workers=1)
    assert len(list(tmp_path.rglob("*.cubin"))) >= 4
    with pytest.raises(RuntimeError, match="kernels are interpreted"):
        compile_calls(task)


def test_layers_that_differ_in_form_alone_are_both_run() -> None:
    """Their calls take other kernels."""
    factors = fastbound.FusedBoundedLinear(8, 8, 2)
    product = fastbound.FusedBoundedLinear(8, 8, 2, form="product")
    assert warming._kind(factors) != warming._kind(product)

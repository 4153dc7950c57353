"""The first call of a shape chooses its kernels before it is answered, and cannot lose by it.

A GPU is pretended: the kernels run in the interpreter, and a clock of the test's own says which of
them is fast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastbound
from fastbound import bounded_linear
from fastbound.dispatch.first_use import DeviceBench
from fastbound.operator import block_function, block_ops, engine, ops, trials
from fastbound.operator.block_function import bounded_mlp
from fastbound.operator.function import bounded_addition
from fastbound.truth import formula
from fastbound.truth.exactness import assert_as_exact_as_the_formula, assert_block_as_exact
from fastbound.truth.operands import block_operands, layer_operands, run
from tests.support.first_use import SMALL_GPU, Clock, measuring
from tests.support.models import Gated

pytest.importorskip("triton", reason="the candidates are Triton's")
pytestmark = pytest.mark.usefixtures("interpreted_bf16")
M, N, K, RANK = 128, 256, 256, 8
FAST_FUSED = {"split": 1.0, "torch": 1.1, "fused": 0.5}


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    """On the small GPU; the fused path is twice as fast."""
    with measuring(tmp_path, Clock(**FAST_FUSED), SMALL_GPU) as made:
        yield made


def operands(rows: int = M, **changes: Any) -> Any:
    return layer_operands((rows, K), N, RANK, torch.bfloat16, **changes)


def both(o: Any, **settings: Any) -> dict[str, Tensor]:
    return run(o, partial(bounded_linear, **settings))


def chosen() -> dict[str, str]:
    """The strategy of each part that has been called."""
    return {route.key.part: route.plan.strategy for route in engine._routes.values()}


@pytest.mark.interpreted
def test_forward_and_backward_choose_apart_and_answer_as_chosen(clock: Clock) -> None:
    ours, fused = both(operands()), both(operands(), backend="fused")
    assert clock.asked == [("split", "torch", "fused")] * 2
    assert all(torch.equal(ours[name], fused[name]) for name in fused)
    strategies = {r.key.part: r.plan.strategy for r in engine._routes.values()
                  if r.key.backend == "auto"}  # fmt: skip
    assert strategies == {"forward": "fused", "backward": "fused"}


def test_the_next_process_reads_what_this_one_found(clock: Clock, tmp_path: Path) -> None:
    first = both(operands())
    (path,) = (tmp_path / "measured").glob("*.json")
    before = path.read_bytes()
    engine.forget()
    clock.times = {"split": 0.1}
    again = both(operands())
    assert len(clock.asked) == 2 and path.read_bytes() == before
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.interpreted
def test_explain_shows_what_is_to_come_and_then_the_times(clock: Clock) -> None:
    layer = fastbound.FusedBoundedLinear(K, N, RANK, dtype=torch.bfloat16)
    before = str(fastbound.explain(layer, tokens=M))
    assert 'split: default tiles of sm_80; not measured yet: the first call times "split"' in before
    layer(torch.randn(M, K).bfloat16()).float().sum().backward()
    after = str(fastbound.explain(layer, tokens=M))
    assert "  fused: measured " in after and "fused 500 ms, split 1e+03 ms, torch 1.1e+03" in after
    assert "  gemm   128x256x32" in after
    engine.forget()
    assert str(fastbound.explain(layer, tokens=M)).count("fused: measured") == 1


@pytest.mark.parametrize("form", ["layer", "block"])
def test_nothing_is_read_from_the_device_where_nothing_can_be_measured(
    form: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing a trial reads from the device, which would end the capture of a CUDA graph."""
    clock.hindrance = "a CUDA graph was being captured"
    prepared = mock.Mock(side_effect=AssertionError("a trial was prepared"))
    for module in (ops, block_ops, block_function):
        for name in (name for name in vars(module) if name.endswith("_trial")):
            monkeypatch.setattr(module, name, prepared)
    if form == "layer":
        both(operands())
    else:
        run(block_operands((M, K), N, (RANK,) * 3, torch.bfloat16), bounded_mlp)
    assert chosen().keys() == {"forward", "backward", *(["whole"] if form == "block" else [])}
    assert not clock.asked


@pytest.mark.interpreted
def test_no_key_changes_once_it_is_chosen(clock: Clock) -> None:
    clock.hindrance = "a CUDA graph was being captured"
    both(operands())
    clock.hindrance = None
    both(operands())
    assert not clock.asked and chosen() == {"forward": "split", "backward": "split"}
    row = next(iter(fastbound.explain(fastbound.FusedBoundedLinear(K, N, RANK,
               dtype=torch.bfloat16), tokens=M)))  # fmt: skip
    assert row.plan.reason.startswith("not measured, as a CUDA graph was being captured")


@pytest.mark.interpreted
def test_planning_that_is_fixed_measures_and_reads_nothing(clock: Clock, tmp_path: Path) -> None:
    both(operands())
    fastbound.set_planning("fixed")
    both(operands())
    assert len(clock.asked) == 2 and chosen() == {"forward": "split", "backward": "split"}
    with pytest.raises(ValueError, match="planning must be one of measured, fixed, got 'fast'"):
        fastbound.set_planning("fast")


@pytest.mark.interpreted
@pytest.mark.parametrize("rows", [127, 129])
def test_few_rows_and_waves_that_end_early_never_try_the_fused_path(
    rows: int, clock: Clock
) -> None:
    both(operands(rows))
    assert clock.asked == ([] if rows < M else [("split", "torch")] * 2)
    assert set(chosen().values()) == {"split"}


def out_of_resources(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of resource: shared memory, Required: 176144, Hardware limit: 101376")


def without_the_term(X: Tensor, W: Tensor, *_: Any) -> Tensor:
    return X @ W.t()


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("fault", "why"),
    [(out_of_resources, "Hardware limit: 101376"), (without_the_term, "result 0 is off by")],
)
@pytest.mark.parametrize(
    "zero",
    [pytest.param(False, marks=pytest.mark.slow, id="B"), pytest.param(True, id="B = 0")],
)
def test_a_gemm_that_does_not_run_or_is_wrong_is_let_go_for_good(
    fault: Callable[..., Any], why: str, zero: bool, clock: Clock, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before the first step, too, when B is zero and the term shows in no result."""
    monkeypatch.setattr("fastbound.operator.triton_engine.lowrank_gemm", fault)
    o = operands()
    o = o.changed(lambda name, t: torch.zeros_like(t) if zero and name == "B" else t)
    with pytest.warns(UserWarning, match='"fused" is not used here') as warned:
        ours = both(o)
    assert len({str(w.message) for w in warned}) == len(warned) <= 2
    assert clock.asked == [("split", "torch")] * 2
    expected = both(o, backend="split")
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    monkeypatch.undo()
    with warnings.catch_warnings(), measuring(tmp_path, clock, SMALL_GPU):
        warnings.simplefilter("error")
        both(o)  # the next process knows
    assert len(clock.asked) == 2


@pytest.mark.interpreted
@pytest.mark.parametrize("rows", [100, 128])
def test_a_kernel_that_fails_later_is_answered_by_pytorch(
    rows: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At rows that are not measured, and after a choice: another number of rows, another binary."""
    clock.times = {"split": 0.5}
    both(operands(rows))
    for name in ("thin", "thin_and_reduce", "reduce"):
        monkeypatch.setattr(f"fastbound.operator.triton_engine.{name}", out_of_resources)
    o = operands(rows)
    with pytest.warns(UserWarning, match='"split" is no longer used here: RuntimeError') as said:
        assert_as_exact_as_the_formula(o, bounded_linear)
    assert len(said) == 1 and set(chosen().values()) == {"torch"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(o)
        engine.forget()
        if rows == M:  # kept on disk
            both(o)


def test_a_mask_made_by_triton_is_read_by_pytorch(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbound.operator.triton_engine.thin", out_of_resources)
    o = layer_operands((100, 67), 40, 4, torch.float32)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="no longer used"):
        ours = both(o, dropout=0.4)
    torch.manual_seed(3)
    expected = both(o, dropout=0.4, backend="reference")
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreted
def test_memory_that_runs_out_is_the_callers_to_know(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    both(operands(100))
    monkeypatch.setattr("fastbound.operator.triton_engine.thin", hungry)
    with pytest.raises(torch.OutOfMemoryError):
        both(operands(100))
    assert chosen() == {"forward": "split", "backward": "split"}


@pytest.mark.interpreted
@pytest.mark.parametrize("spoil", ["dy", "x"])
def test_infinite_gradients_are_measured_with_noise_and_an_infinite_x_is_not(
    spoil: str, clock: Clock
) -> None:
    """Loss scaling begins with gradients that overflow."""

    def spoiled(name: str, t: Tensor) -> Tensor:
        return torch.full_like(t, torch.inf) if name == spoil else t

    both(operands().changed(spoiled))
    measured = ["fused", "fused"] if spoil == "dy" else ["split", "split"]
    assert [chosen()[part] for part in ("forward", "backward")] == measured


def test_nothing_of_the_users_is_touched(clock: Clock) -> None:
    o = operands()
    saved: list[Tensor] = []
    before = {n: t.clone() for n, t in vars(o).items() if isinstance(t, Tensor)}
    leaves = o.leaves()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bounded_linear(leaves.x, **leaves.arguments)
    y.backward(o.dy)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(saved) == 5 and len(clock.asked) == 2  # x, S, weight, A and B of the call itself
    assert all(torch.equal(getattr(o, name), value) for name, value in before.items())


@pytest.mark.interpreted
def test_under_a_transform_nothing_is_tried(clock: Clock) -> None:
    o = operands()

    def loss(x: Tensor) -> Tensor:
        return bounded_linear(x, **o.arguments).float().square().mean()

    gradient = torch.func.grad(loss)(o.x)
    assert not clock.asked and set(chosen().values()) == {"split"} and gradient.any()
    reasons = {route.plan.reason.split(":")[0] for route in engine._routes.values()}
    assert all(reason.startswith("not measured, as") for reason in reasons)


@pytest.mark.slow  # bf16 stands in the other tests
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_candidate_of_every_dtype_is_found_right(
    dtype: torch.dtype, dropout: float, clock: Clock
) -> None:
    o = layer_operands((M, K), N, RANK, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(o, dropout=dropout)
    fused = ("split", "torch") if dtype is torch.float32 else ("split", "torch", "fused")
    assert clock.asked == [fused] * 2


@pytest.mark.interpreted
def test_over_a_base_and_with_a_strided_x_there_is_no_fused_candidate(clock: Clock) -> None:
    o = operands().leaves()
    result = torch.randn(M, N).bfloat16().requires_grad_()
    settings = {"scaling": o.scaling, "omega": o.omega}
    y = bounded_addition(result, o.x, o.A, o.B, **settings)
    expected = bounded_addition(result, o.x, o.A, o.B, backend="split", **settings)
    assert torch.equal(y, expected)
    y.backward(o.dy)
    wide = torch.randn(M, 2 * K).bfloat16()[:, ::2]
    bounded_linear(wide, o.weight, o.A, o.B)
    assert clock.asked == [("split", "torch")] * 3


@pytest.mark.interpreted
def test_the_product_form_chooses_between_its_kernels_and_pytorch(clock: Clock) -> None:
    o = operands(form="product")
    assert_as_exact_as_the_formula(o, bounded_linear)
    assert clock.asked == [("split", "torch")] * 2
    assert chosen() == {"forward": "split", "backward": "split"}


@pytest.mark.slow  # every launch of a block, interpreted; on a CPU's own kernels below
class TestBlocks:
    @staticmethod
    def block(gated: bool) -> Any:
        form = {"gated": gated, "activation": "silu" if gated else "gelu_tanh"}
        return block_operands((M, K), N, (RANK,) * 3, torch.bfloat16, **form)

    def test_engines_are_chosen_forward_and_backward(self, clock: Clock) -> None:
        block = self.block(gated=True)
        clock.times = {**FAST_FUSED, "block": 0.5}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = run(block, bounded_mlp)
        routes = {r.key.part: r.plan.strategy for r in engine._routes.values() if r.key.form}
        assert routes == {"whole": "block", "forward": "fused", "backward": "fused"}
        fused = run(block, bounded_mlp, backend="fused")
        assert all(torch.equal(ours[name], fused[name]) for name in fused)

    def test_layer_by_layer_where_that_is_faster(self, clock: Clock) -> None:
        block = self.block(gated=False)
        clock.times = {"layers": 0.9}
        assert_block_as_exact(block, bounded_mlp)
        assert ("block", "layers") in clock.asked
        whole = next(r for r in engine._routes.values() if r.key.part == "whole")
        assert whole.plan.strategy == "layers"
        assert "layers 900 ms, block 1e+03 ms" in whole.plan.reason


@pytest.fixture
def cpu(tmp_path: Path) -> Iterator[Clock]:
    """This machine's own CPU, on which only the way of a whole block is open."""
    with measuring(tmp_path, Clock(layers=0.5)) as made:
        yield made


def adapted() -> Any:
    block = fastbound.FusedBoundedMLP.from_mlp(Gated(K=16, N=24), rank=4)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("adapter.B"):
                parameter.normal_(std=0.1)
    return block


class TestBlocksOnACpu:
    def test_explain_says_what_was_found(self, cpu: Clock) -> None:
        block = adapted()
        before = fastbound.explain(block, tokens=512)
        assert 'not measured yet: the first call times "block" against "layers"' in str(before)
        block(torch.randn(512, 16)).sum().backward()
        text = str(fastbound.explain(block, tokens=512))
        assert "  layer by layer: measured " in text and "layers 500 ms, block 1e+03 ms" in text
        assert fastbound.explain(block, tokens=511).blocks[0].fused

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_recomputes_what_it_ran(self, reentrant: bool, cpu: Clock) -> None:
        block, x = adapted(), torch.randn(512, 16, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        y.square().sum().backward()
        got = [p.grad.clone() for p in (x, *(p for p in block.parameters() if p.requires_grad))]
        assert len(cpu.asked) == 1
        for p in (x, *block.parameters()):
            p.grad = None
        block(x).square().sum().backward()
        again = [p.grad for p in (x, *(p for p in block.parameters() if p.requires_grad))]
        for a, b in zip(got, again, strict=True):
            torch.testing.assert_close(a, b)

    def test_fp32_factors_of_an_fp64_block_are_measured_too(self, cpu: Clock) -> None:
        block, x = adapted().double(), torch.randn(512, 16, dtype=torch.float64)
        for layer in block.adapted_layers().values():
            layer.adapter.float()  # the sine of an fp32 factor is fp32
        block(x)
        assert len(cpu.asked) == 1
        assert "not measured" not in str(fastbound.explain(block, tokens=512))

    @pytest.mark.parametrize("how", ["no_grad", "recompute", "few rows", "compiled", "intercepted"])
    def test_a_call_that_must_not_choose_runs_as_one_operator(self, how: str, cpu: Clock) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        block, x = adapted(), torch.randn(511 if how == "few rows" else 512, 16)
        if how == "recompute":
            block.recompute = "gate_up"
        if how == "no_grad":
            with torch.no_grad():
                block(x)
        elif how == "intercepted":
            with Mode():
                block(x)
        elif how == "compiled":
            torch.compile(block, backend="eager", fullgraph=True)(x)
        else:
            block(x)
        assert not cpu.asked
        assert not any(r.key.part == "whole" and r.engine for r in engine._routes.values())

    def test_autocast_and_packed_projections_run_layer_by_layer_too(self, cpu: Clock) -> None:
        block, x = adapted(), torch.randn(512, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        fastbound.set_planning("fixed")
        with torch.autocast("cpu", torch.bfloat16):
            expected = block(x)
        assert len(cpu.asked) == 1 and y.dtype is torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)

    def test_the_clock_of_a_cpu_stops_after_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastbound.dispatch.first_use.CPU_SECONDS", 0.0)
        turns: list[int] = []
        taken = DeviceBench().seconds({"a": turns.append, "b": turns.append}, torch.device("cpu"))
        assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


def test_factors_that_are_drawn_weigh_about_as_much_as_the_weight() -> None:
    """Else an error in the term would pass for rounding."""
    cases = ((1e-3, 40.0, "factors"), (0.5, 1.0, "factors"), (0.5, 100.0, "product"))
    for scaling, omega, form in cases:
        weight = 0.02 * torch.randn(300, 200)
        zeros = (torch.zeros(8, 200), torch.zeros(300, 8))
        A, B = trials._factors(*zeros, scaling, omega, form, weight)
        change = formula.delta_weight(A, B, scaling=scaling, omega=omega, form=form)
        bound = scaling * 8
        least = min(0.3, 0.3 * bound / 0.02 / 8**0.5)
        assert least < float(change.std() / weight.std()) < 3

"""Each competitor computes and saves what it claims; one that does not is left out."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.rivals import calls, measuring
from benchmarks.rivals.cases import SMOKE_SHAPES, Block, Case, Shape
from benchmarks.rivals.competitors import (
    BLOCK_COMPETITORS,
    FROZEN,
    LAYER_COMPETITORS,
    Competitor,
    Contender,
    operator,
)
from benchmarks.rivals.measuring import forward_and_backward, measure
from benchmarks.rivals.products import PRODUCTS, product_operands
from benchmarks.rivals.replay import play, playback, recorded_time
from fastbound.performance.memory import saved_bytes
from fastbound.truth import formula
from fastbound.truth.operands import LayerOperands, Operands, layer_operands
from tests.support.first_use import SMALL_GPU, Clock
from tests.support.first_use import measuring as first_use

CPU = torch.device("cpu")
TINY = Case(Shape("tiny", "up", 24, 40), 32, "bfloat16", rank=4)
# What a CPU without a GPU leaves out, and where there is no compiler `compiled` as well.
ALWAYS = {"frozen", "fused", "addmm", "peft_fp32", "peft_bf16"}


def test_playback_gives_back_the_samples_exactly() -> None:
    samples = [0.1, 1e-7, 3.3333333333333335, 12345.678]
    setup, seen = play(samples), []
    for _ in samples:
        (seconds,), _ = setup()
        start = recorded_time()
        playback(seconds)
        seen.append(recorded_time() - start)
    assert seen == samples


@pytest.mark.parametrize("name", ["frozen", "fused", "addmm", "peft_bf16", "peft_fp32"])
def test_saved_bytes_of_a_layer_are_those_of_x_and_S(name: str) -> None:
    M, K, N, rank = 64, 48, 80, 16
    shape = Shape("m", "p", K, N)
    o = Case(shape, M, "bfloat16", rank).operands(CPU)
    contender = next(c for c in LAYER_COMPETITORS if c.name == name).build(o)
    x = o.leaves().x
    itemsize = {"frozen": 0, "peft_fp32": 4}.get(name, 2)
    expected = itemsize * M * (K + rank)
    if name.startswith("peft"):
        # Per factor besides: sin(ωP) in the dtype of P, and ωP for the sine's backward.
        expected += 2 * itemsize * rank * (K + N)
    assert saved_bytes(lambda: contender.forward(x), [*o.frozen, *contender.trained]) == expected


def test_each_competitor_measures_what_it_claims() -> None:
    runnable = [c for c in LAYER_COMPETITORS if c.name in ALWAYS]
    results = measure(TINY, runnable, CPU, rounds=2)
    for name, result in results.items():
        assert result.failure is None, name
        assert {d: len(s) for d, s in result.samples.items()} == {
            "forward": 2,
            "forward+backward": 2,
        }


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("times", "path"),
    [
        ({"split": 1.0, "torch": 1.1, "fused": 0.5}, "fused"),
        ({"split": 1.0, "torch": 0.5, "fused": 1.1}, "torch"),
        ({"split": 1.0, "torch": 1.1, "fused": 1.1}, "split"),
    ],
)
def test_the_path_of_auto_is_what_its_first_calls_chose(
    times: dict[str, float], path: str, tmp_path: Path, interpreted_bf16: None
) -> None:
    with first_use(tmp_path, Clock(**times), SMALL_GPU):
        o = layer_operands((128, 256), 256, 8, torch.bfloat16, bias=False)
        contender = operator("auto", forced=True)(o)
        forward_and_backward(contender, o.x.detach().requires_grad_(), o.dy)
        assert contender.path() == path


def test_a_wrong_competitor_fails_and_the_others_go_on() -> None:
    def without_sine(o: Operands) -> Contender:
        assert isinstance(o, LayerOperands)
        own, low_rank = o.leaves(), o.scaling * o.omega**2

        def forward(x: Tensor) -> Tensor:
            S = x @ own.A.to(x.dtype).T
            return x @ own.weight.T + low_rank * (S @ own.B.to(x.dtype).T)

        return Contender(forward, (own.A, own.B), lambda: "no sine")

    results = measure(TINY, [FROZEN, Competitor("wrong", without_sine)], CPU, rounds=2)
    assert isinstance(results["wrong"].failure, ArithmeticError)
    assert results["wrong"].samples == {}
    assert len(results["frozen"].samples["forward"]) == 2


def test_nothing_of_one_that_failed_is_kept_while_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def broken(o: Operands) -> Contender:
        own = torch.ones(1000)
        held.append(weakref.ref(own))
        try:
            raise ValueError("while it was built")
        except ValueError:
            raise RuntimeError(f"no room beside {len(own)}") from None

    def timed(steps: object, **settings: object) -> dict[str, list[float]]:
        alive.extend(tensor() is not None for tensor in held)
        return {}

    monkeypatch.setattr(measuring, "interleaved", timed)
    results = measure(TINY, [FROZEN, Competitor("broken", broken)], CPU, rounds=2)
    failure = results["broken"].failure
    assert alive == [False] and str(failure) == "no room beside 1000"
    with pytest.raises(RuntimeError, match="no room") as raised:  # as the replay raises it
        raise failure
    assert "in broken" in str(raised.value.__cause__)


TINY_BLOCKS = [
    Case(Block("tiny", 24, 40, "silu", gated=True, bias=False), 32, "bfloat16", rank=4),
    Case(Block("tiny", 24, 40, "gelu_tanh", gated=False, bias=True), 1500, "float32", rank=4),
]


@pytest.mark.parametrize("case", TINY_BLOCKS, ids=["gated", "plain"])
def test_each_competitor_on_a_block_measures_what_it_claims(case: Case) -> None:
    runnable = [c for c in BLOCK_COMPETITORS if c.name not in ("compiled", "peft_bf16")]
    for name, result in measure(case, runnable, CPU, rounds=2).items():
        assert result.failure is None, name
        assert {len(samples) for samples in result.samples.values()} == {2}


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_block_without_one_adapter_fails(projection: str) -> None:
    def incomplete(o: Operands) -> Contender:
        own = o.leaves()
        arguments = own.arguments
        arguments[projection] = arguments[projection]._replace(scaling=0.0)
        forward = functools.partial(formula.bounded_mlp, **arguments)
        return Contender(forward, tuple(own.trained.values()), lambda: "incomplete")

    results = measure(TINY_BLOCKS[0], [Competitor("wrong", incomplete)], CPU, rounds=1)
    assert isinstance(results["wrong"].failure, ArithmeticError)


def test_a_call_that_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(o: Operands) -> Contender:
        raise RuntimeError("not here")

    monkeypatch.setattr(calls, "LAYER_COMPETITORS", (FROZEN, Competitor("fused", broken)))
    case = Case(SMOKE_SHAPES[0], 8, "float32", 4)
    rows, failures = calls.measure_calls(case, CPU, rounds=2)
    assert [row.competitor for row in rows] == ["frozen"]
    assert failures[0].competitor == "fused" and "not here" in failures[0].message


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_form_of_a_product_is_that_product(product: str) -> None:
    operands = product_operands(24, 40, 56, 16, torch.float64)
    forms = {n: f for n, f in PRODUCTS[product].items() if "floor" not in n}
    first, *others = (form(*operands) for form in forms.values())
    for other in others:
        torch.testing.assert_close(other, first)

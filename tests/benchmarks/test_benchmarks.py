"""The benchmarks run, measure what they say, and their report renders."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.report import plots
from benchmarks.report import rows as report
from benchmarks.rivals.block import (
    MLP_COMPETITORS,
    BlockProblem,
    make_block_problem,
    plain_block,
)
from benchmarks.rivals.block import frozen as frozen_block
from benchmarks.rivals.cases import Block, Case, Shape, mlp_cases
from benchmarks.rivals.interleaved import play, playback, recorded_time
from benchmarks.rivals.layer import COMPETITORS, Competitor, Layer, Problem, make_problem
from benchmarks.rivals.measuring import measure
from benchmarks.rivals.products import PRODUCTS, make_operands
from benchmarks.static import floor
from fastbound.performance import prediction as time_model
from fastbound.performance.memory import saved_bytes
from fastbound.performance.timing import interleaved
from fastbound.truth import formula

CPU = torch.device("cpu")
TINY = Case(Shape("tiny", "up", 24, 40), 32, "bfloat16", rank=4)
# What a CPU without a GPU leaves out, and where there is no compiler `compiled` as well.
ALWAYS = {"frozen", "fused", "addmm", "peft_fp32", "peft_bf16"}


@pytest.fixture(scope="module")
def smoke_json(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of one smoke run of the whole suite, as a user would start it."""
    path = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    # pytest-benchmark measures nothing under xdist, whose variables a run of these tests may have.
    environment = {
        k: v
        for k, v in os.environ.items()
        if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
    }
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--smoke"]
    run = subprocess.run(
        [*command, "--device=cpu", f"--benchmark-json={path}", "-p", "no:cacheprovider"],
        cwd=repository,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ratios, from medians of interleaved rounds" in run.stdout
    return path


@pytest.mark.slow
def test_smoke_run_holds_every_competitor_and_the_facts(smoke_json: Path) -> None:
    saved = json.loads(smoke_json.read_text())
    tests: dict[tuple[Any, ...], set[str]] = {}
    for bench in saved["benchmarks"]:
        if not bench["fullname"].startswith("benchmarks/bench_linear.py"):
            continue
        info = bench["extra_info"]
        tests.setdefault((info["M"], info["direction"]), set()).add(info["competitor"])
        assert bench["stats"]["rounds"] == len(bench["stats"]["data"]) == 3
        assert bench["group"].endswith(info["direction"])
    assert set(tests) == {(M, d) for M in (32, 64) for d in ("forward", "forward+backward")}
    for competitors in tests.values():
        assert competitors - {"compiled"} == ALWAYS
    facts = saved["machine_info"]["fastbound"]
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert {"device", "driver", "triton", "peft", "version"} <= facts.keys()


@pytest.mark.slow
def test_smoke_run_holds_every_competitor_of_both_blocks(smoke_json: Path) -> None:
    saved = json.loads(smoke_json.read_text())
    found: dict[str, set[str]] = {}
    for bench in saved["benchmarks"]:
        if bench["fullname"].startswith("benchmarks/bench_mlp.py"):
            found.setdefault(bench["group"], set()).add(bench["extra_info"]["competitor"])
    assert set(found) == {
        f"{case} {direction}"
        for case in mlp_cases("cpu", smoke=True)
        for direction in ("forward", "forward+backward")
    }
    for competitors in found.values():
        assert competitors - {"compiled"} == ALWAYS - {"addmm"} | {"per_layer"}


@pytest.mark.slow
def test_report_renders_from_a_saved_run(smoke_json: Path, tmp_path: Path) -> None:
    report.main([str(smoke_json), "--output", str(tmp_path)])
    text = (tmp_path / "smoke.md").read_text()
    _, rows = report.read(smoke_json)
    for row in rows:
        assert f"{row.median * 1e3:.3f}" in text
    for name in ("smoke-time.png", "smoke-saved.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def row(competitor: str, median: float) -> report.Row:
    info = {"model": "m", "projection": "p", "M": 1, "K": 2, "N": 3, "rank": 4}
    info |= {"dtype": "bfloat16", "direction": "forward", "competitor": competitor}
    info |= {"path": "", "saved_bytes": 0, "peak_bytes": None}
    stats = {"median": median, "q1": median, "q3": median, "min": median, "rounds": 3}
    return report.Row.of(info, stats)


def test_ratios_are_of_medians() -> None:
    table = report.ratio_table([row("frozen", 2.0), row("fused", 2.5), row("peft_fp32", 5.0)])
    fused = next(line for line in table.splitlines() if line.startswith("| fused"))
    cells = [cell.strip() for cell in fused.strip("|").split("|")]
    assert cells[4:7] == ["1.250", "2.000", "-"]  # x frozen, peft_fp32 / it, peft_bf16 / it


def test_time_is_not_plotted_without_a_floor(tmp_path: Path) -> None:
    assert plots.draw("a device", [row("fused", 2.0)], tmp_path, "x") == [tmp_path / "x-saved.png"]


def test_report_names_a_file_that_is_not_a_saved_run(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"other\.json does not look like JSON saved by"):
        report.read(path)


def test_every_round_runs_every_step_once_in_a_new_order() -> None:
    calls: list[tuple[str, int]] = []

    def step(name: str) -> Callable[[int], object]:
        return lambda turn: calls.append((name, turn))

    def stopwatch(run: Callable[[], object]) -> float:
        run()
        return float(len(calls))

    names = "abcdef"
    samples = interleaved({n: step(n) for n in names}, rounds=20, stopwatch=stopwatch)
    rounds = [calls[i : i + len(names)] for i in range(0, len(calls), len(names))]
    assert [turn for _, turn in calls] == list(range(20 * len(names)))
    assert all(sorted(name for name, _ in round_) == list(names) for round_ in rounds)
    assert len({tuple(name for name, _ in round_) for round_ in rounds}) > 15
    for name in names:  # the sample of a round is the one its own call got
        assert samples[name] == [turn + 1.0 for called, turn in calls if called == name]


def test_playback_gives_back_the_samples_exactly() -> None:
    samples = [0.1, 1e-7, 3.3333333333333335, 12345.678]
    setup, seen = play(samples), []
    for _ in samples:
        (seconds,), _ = setup()
        start = recorded_time()
        playback(seconds)
        seen.append(recorded_time() - start)
    assert seen == samples


def test_saved_bytes_counts_storages_once_and_leaves_parameters_out() -> None:
    M, K, N = 8, 16, 4
    weight = nn.Parameter(torch.randn(N, K))
    x = torch.randn(M, K, requires_grad=True)

    def twice() -> Tensor:
        return (x @ weight.T).exp() + x[:, :N] * (x @ weight.T)

    # x (once, though saved three times and once as a view), exp's result, the second product.
    assert saved_bytes(twice, [weight]) == 4 * (M * K + M * N + M * N)
    assert saved_bytes(twice, []) == 4 * (M * K + M * N + M * N + N * K)


@pytest.mark.parametrize("name", ["frozen", "fused", "addmm", "peft_bf16", "peft_fp32"])
def test_saved_bytes_of_a_layer_are_those_of_the_floor_table(name: str) -> None:
    M, K, N, rank = 64, 48, 80, 16
    problem = make_problem(M, K, N, rank, torch.bfloat16, CPU)
    layer = next(c for c in COMPETITORS if c.name == name).build(problem)
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    expected = time_model.saved_bytes(name, Shape("m", "p", K, N), M, rank)
    if name.startswith("peft"):
        # Beyond the table, per factor: sin(ωP) in the dtype of P, and ωP for the sine's backward.
        itemsize = 2 if name == "peft_bf16" else 4
        expected += 2 * itemsize * rank * (K + N)
    assert saved_bytes(lambda: layer.forward(x), [problem.weight, *layer.trained]) == expected


def test_each_competitor_measures_what_it_claims() -> None:
    runnable = [c for c in COMPETITORS if c.name in ALWAYS]
    results = measure(TINY, runnable, CPU, rounds=2)
    for name, result in results.items():
        assert result.failure is None, name
        assert {d: len(s) for d, s in result.samples.items()} == {
            "forward": 2,
            "forward+backward": 2,
        }


def test_a_wrong_competitor_fails_and_the_others_go_on() -> None:
    def without_sine(problem: Problem) -> Layer:
        A = problem.A.clone().requires_grad_()
        B = problem.B.clone().requires_grad_()
        low_rank = problem.scaling * problem.omega**2

        def forward(x: Tensor) -> Tensor:
            S = x @ A.to(x.dtype).T
            return x @ problem.weight.T + low_rank * (S @ B.to(x.dtype).T)

        return Layer(forward, (A, B), "no sine")

    frozen = next(c for c in COMPETITORS if c.name == "frozen")
    results = measure(TINY, [frozen, Competitor("wrong", without_sine)], CPU, rounds=2)
    assert isinstance(results["wrong"].failure, ArithmeticError)
    assert results["wrong"].samples == {}
    assert len(results["frozen"].samples["forward"]) == 2


TINY_BLOCKS = [
    Case(Block("tiny", 24, 40, "silu", gated=True, bias=False), 32, "bfloat16", rank=4),
    Case(Block("tiny", 24, 40, "gelu_tanh", gated=False, bias=True), 1500, "float32", rank=4),
]


@pytest.mark.parametrize("case", TINY_BLOCKS, ids=["gated", "plain"])
def test_each_competitor_on_a_block_measures_what_it_claims(case: Case) -> None:
    runnable = [c for c in MLP_COMPETITORS if c.name not in ("compiled", "peft_bf16")]
    for name, result in measure(case, runnable, CPU, rounds=2).items():
        assert result.failure is None, name
        assert {len(samples) for samples in result.samples.values()} == {2}


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_a_block_without_one_adapter_fails(projection: str) -> None:
    def incomplete(problem: BlockProblem) -> Layer:
        projections, trained = problem.trainable()
        projections[projection] = projections[projection]._replace(scaling=0.0)
        forward = functools.partial(
            formula.bounded_mlp, **projections, activation=problem.activation
        )
        return Layer(forward, trained, "incomplete")

    results = measure(TINY_BLOCKS[0], [Competitor("wrong", incomplete)], CPU, rounds=1)
    assert isinstance(results["wrong"].failure, ArithmeticError)


def test_truths_of_a_block_sum_over_all_rows_and_keep_the_first() -> None:
    """In parts of 1024 rows: the whole is what one call over all rows gives."""
    block = Block("tiny", 6, 10, "gelu", gated=True, bias=True)
    problem = make_block_problem(block, 2500, 3, torch.float32, CPU)
    x, dy = torch.randn(2500, 6, requires_grad=True), torch.randn(2500, 6)
    truths = problem.truths(x, dy, 300)
    wide = {
        name: p._replace(
            weight=p.weight.double(),
            bias=p.bias.double(),
            A=p.A.double().requires_grad_(),
            B=p.B.double().requires_grad_(),
        )
        for name, p in problem.projections.items()
    }
    x64 = x.detach().double().requires_grad_()
    y = formula.bounded_mlp(x64, **wide, activation="gelu")
    factors = [factor for p in wide.values() for factor in (p.A, p.B)]
    dx, *gradients = torch.autograd.grad(y, (x64, *factors), dy.double())
    whole = [y[:300], dx[:300], *gradients]
    names = ["y", "dx", *(f"d{p} {f}" for p in ("gate", "up", "down") for f in "AB")]
    assert list(truths[True]) == names
    for value, expected in zip(truths[True].values(), whole, strict=True):
        torch.testing.assert_close(value, expected)
    bare = frozen_block(problem).forward(x)
    torch.testing.assert_close(truths[False]["y"].float(), bare[:300])


def test_a_block_runs_its_projections_in_order() -> None:
    def projection(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: x * {"gate": 2.0, "up": 3.0, "down": 5.0}[name]

    one = torch.tensor(1.0)
    layers = {name: projection(name) for name in ("gate", "up", "down")}
    assert plain_block("relu", layers)(one) == 5 * (2 * 3)
    del layers["gate"]
    assert plain_block("relu", layers)(-one) == 0


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_form_of_a_product_is_that_product(product: str) -> None:
    operands = make_operands(24, 40, 56, 16, torch.float64)
    forms = {n: f for n, f in PRODUCTS[product].items() if "floor" not in n}
    first, *others = (form(operands) for form in forms.values())
    for other in others:
        torch.testing.assert_close(other, first)


def test_floor_counts_operations_and_bytes() -> None:
    shape, M = Shape("m", "p", 4096, 14336), 8192
    assert time_model.gemm_flops(shape, M) == 2 * 8192 * 4096 * 14336
    assert time_model.gemm_bytes(shape, M) == 2 * (8192 * 4096 + 4096 * 14336 + 8192 * 14336)
    compute = time_model.Ceilings(flops=1.0, bandwidth=float("inf"))
    memory = time_model.Ceilings(flops=float("inf"), bandwidth=1.0)
    assert time_model.gemm_seconds(shape, M, compute) == time_model.gemm_flops(shape, M)
    assert time_model.gemm_seconds(shape, M, memory) == time_model.gemm_bytes(shape, M)
    assert time_model.predicted_ratio("frozen", shape, M, floor.GPU_CEILINGS) == 1


def test_notes_hold_the_floor_that_the_script_prints(repository: Path) -> None:
    notes = (repository / "benchmarks" / "NOTES.md").read_text()
    printed = floor.document(floor.GPU_CEILINGS)
    assert printed in notes, "run `python -m benchmarks.static.notes`"

"""The meter counts what it says, and the kernels read and write no tall tensor more than needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the interpreter is Triton's, which is not here")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels are compiled here: nothing to meter", allow_module_level=True)

import triton
import triton.language as tl
from fastbound.kernels.launch import Launch
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.rivals.cases import Block
from benchmarks.rivals.competitors import BLOCK_COMPETITORS, LAYER_COMPETITORS
from benchmarks.static import traffic
from benchmarks.static.meter import Meter, Step
from benchmarks.static.recorded import BLOCK_RIVALS, calls_of
from benchmarks.static.traffic import (
    DIRECTIONS,
    DTYPE,
    GATED,
    IDEAL_GATED,
    IDEAL_LINEAR,
    IDEAL_PLAIN,
    PLAIN,
    RANK,
    Accesses,
    Counted,
    K,
    M,
    N,
)
from fastbound.dispatch.device import Device
from fastbound.performance.prediction import BF16, Region, operands, prediction_of
from fastbound.performance.recorder import Call, Directions
from fastbound.performance.shapes import Shape


@triton.jit
def _copy_rows(X, Y, rows, columns, stride_x, stride_y, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    x = tl.load(X + row * stride_x + offs, mask=offs < columns)
    not_last = row + 0 * offs < rows - 1
    tl.store(Y + row * stride_y + offs, x, mask=(offs < columns) & not_last)


@triton.jit
def _copy_described(X, Y, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    Y.store([start, 0], X.load([start, 0]))


@triton.jit
def _add_one(X, BLOCK: tl.constexpr):
    tl.atomic_add(X + tl.arange(0, BLOCK), 1.0)


def copy_rows(x: torch.Tensor, y: torch.Tensor, columns: int) -> None:
    _copy_rows[(x.shape[0],)](x, y, x.shape[0], columns, x.stride(0), y.stride(0), BLOCK=16)


class TestMeterOfKernels:
    def test_masked_lanes_are_not_counted(self) -> None:
        x, y = torch.ones(4, 16), torch.zeros(4, 16)
        with Meter() as meter:
            copy_rows(x, y, columns=10)
        (step,) = meter.steps
        assert step.name == "_copy_rows" and not step.gemm
        assert (step.moved[Region.of(x)].read, step.moved[Region.of(x)].written) == (4 * 10 * 4, 0)
        assert (step.moved[Region.of(y)].read, step.moved[Region.of(y)].written) == (0, 3 * 10 * 4)
        assert y[:3, :10].all() and not y[3].any()  # and the kernel did its work

    def test_slices_of_one_storage_are_told_apart(self) -> None:
        both = torch.ones(4, 32)
        left, right = both[:, :16], both[:, 16:]
        with Meter() as meter:
            copy_rows(right, left, columns=16)
        moved = meter.steps[0].moved
        assert (moved[Region.of(right)].read, moved[Region.of(right)].written) == (256, 0)
        assert (moved[Region.of(left)].read, moved[Region.of(left)].written) == (0, 192)

    @pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
        reason="the interpreter of older Triton cannot run host descriptors",
    )
    def test_descriptors_are_counted_inside_the_tensor_only(self) -> None:
        x, y = torch.ones(12, 16), torch.zeros(12, 16)
        block = [8, 16]
        descriptors = [TensorDescriptor.from_tensor(t, block) for t in (x, y)]
        with Meter() as meter:
            _copy_described[(2,)](*descriptors, BLOCK=8)
        moved = meter.steps[0].moved
        assert moved[Region.of(x)].read == moved[Region.of(y)].written == 12 * 16 * 4
        assert y.all()

    def test_an_atomic_reads_and_writes(self) -> None:
        x = torch.zeros(16)
        with Meter() as meter:
            _add_one[(3,)](x, BLOCK=16)
        moved = meter.steps[0].moved[Region.of(x)]
        assert (moved.read, moved.written) == (3 * 64, 3 * 64)

    def test_an_access_outside_every_tensor_is_an_error(self) -> None:
        x, y = torch.ones(4, 8), torch.zeros(4, 16)
        with Meter(), pytest.raises(Exception, match="_copy_rows accesses memory outside"):
            copy_rows(x, y, columns=16)

    def test_nothing_is_counted_after_the_meter(self) -> None:
        x, y = torch.ones(4, 16), torch.zeros(4, 16)
        with Meter() as meter:
            pass
        copy_rows(x, y, columns=16)
        assert meter.steps == []


class TestMeterOfOperations:
    def test_operands_once_and_views_free(self) -> None:
        x, weight = torch.ones(6, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
        with Meter([weight]) as meter:
            y = torch.nn.functional.linear(x.view(2, 3, 8), weight)
            wide = y.float()
            wide.add_(1.0)
            torch.empty(100, 100)
            torch.zeros(5)
            x.new_empty(3).copy_(y.view(-1)[:3])
            (x + x[:1].expand(6, 8)).sum()
        moved = [list(step.moved.values()) for step in meter.steps]
        sums = [(sum(m.read for m in each), sum(m.written for m in each)) for each in moved]
        found = [(step.name, step.gemm, *s) for step, s in zip(meter.steps, sums, strict=True)]
        assert found == [
            ("mm", True, 2 * (6 * 8 + 4 * 8), 2 * 6 * 4),
            ("_to_copy", False, 2 * 24, 4 * 24),
            ("add_", False, 4 * 24, 4 * 24),
            ("zeros", False, 0, 4 * 5),
            ("copy_", False, 2 * 3, 2 * 3),
            ("add", False, 2 * (48 + 8), 2 * 48),
            ("sum", False, 2 * 48, 2),
        ]

    def test_a_product_without_a_weight_is_no_gemm(self) -> None:
        x, weight = torch.ones(6, 8), torch.ones(4, 8)
        with Meter([weight]) as meter:
            torch.mm(x, x.t())
            torch.mm(x, weight.t())
            weight.double()
        assert [step.gemm for step in meter.steps] == [False, True, False]

    def test_sums_of_gradients_are_seen(self) -> None:
        x = torch.ones(8, requires_grad=True)
        y, dy = (x * 2, x * 3), (torch.ones(8), torch.ones(8))
        with Meter() as meter:
            torch.autograd.grad(y, (x,), dy)
        assert [step.name for step in meter.steps] == ["mul", "mul", "add"]


@pytest.fixture(scope="module")
def linear() -> Counted:
    return traffic.counted(LAYER)


@pytest.fixture(scope="module")
def gated() -> Counted:
    return traffic.counted(GATED)


@pytest.fixture(scope="module")
def plain() -> Counted:
    return traffic.counted(PLAIN)


INTERPRETER = Device("interpreter", 4)
LAYER = Shape("traffic", "layer", K, N)


def recorded(name: str, place: Shape | Block) -> Directions:
    return calls_of(name, place, M, RANK, INTERPRETER)


def written_parts(counted: Counted) -> list[int]:
    """Bytes of every workspace that a launch writes; it is written whole."""
    found = []
    for step in (*counted.steps["forward"], *counted.steps["backward"]):
        if step.name in ("_activate_kernel", "_reduce_kernel", "_activate_backward_kernel"):
            for argument in ("P", "Q", "QG", "QU", "QD"):
                region = step.operands.get(argument)
                if region in step.moved and step.moved[region].written:
                    assert step.moved[region].written % region.nbytes == 0
                    found.append(region.nbytes)
    return found


class TestLinear:
    @pytest.mark.parametrize("name", IDEAL_LINEAR)
    def test_passes_are_the_ideal_ones(self, linear: Counted, name: str) -> None:
        passes = tuple(linear.accesses(direction, name) for direction in DIRECTIONS)
        assert passes == IDEAL_LINEAR[name]

    def test_dy_is_read_once_and_x_once_each_way(self, linear: Counted) -> None:
        assert linear.accesses("backward", "dy") == Accesses(1, 0)
        assert linear.accesses("forward", "x") == linear.accesses("backward", "x") == Accesses(1, 0)

    def test_y_and_dx_come_from_one_gemm_each(self, linear: Counted) -> None:
        assert linear.gemms("forward", "y") == linear.gemms("backward", "dx") == Accesses(0, 1)
        assert linear.gemms("forward", "x") == linear.gemms("backward", "dy") == Accesses(1, 0)
        assert sum(step.gemm for steps in linear.steps.values() for step in steps) == 2

    def test_nothing_tall_is_written_but_y_and_dx(self, linear: Counted) -> None:
        written = linear.written(M * K)
        assert written == {linear.regions["y"], linear.regions["dx"]}

    def test_workspaces_are_those_of_the_recorded_launches(self, linear: Counted) -> None:
        workspaces = traffic.workspaces(recorded("fused", LAYER))
        assert written_parts(linear) == [nbytes for _, nbytes in workspaces]
        assert len(workspaces) == 3  # the parts of dS, of dB and of dA


class TestBlock:
    @pytest.mark.parametrize("name", IDEAL_GATED)
    def test_gated_passes_are_the_ideal_ones(self, gated: Counted, name: str) -> None:
        passes = tuple(gated.accesses(direction, name) for direction in DIRECTIONS)
        assert passes == IDEAL_GATED[name]

    @pytest.mark.parametrize("name", IDEAL_PLAIN)
    def test_plain_passes_are_the_ideal_ones(self, plain: Counted, name: str) -> None:
        passes = tuple(plain.accesses(direction, name) for direction in DIRECTIONS)
        assert passes == IDEAL_PLAIN[name]

    def test_act_is_written_once_and_read_once(self, gated: Counted, plain: Counted) -> None:
        for counted in (gated, plain):
            assert counted.accesses("forward", "act") == Accesses(0, 1)
            assert counted.gemms("forward", "act") == Accesses(1, 0)  # down's, and nothing else
            assert counted.accesses("backward", "act") == (0, 0)
            assert counted.gemms("backward", "act") == (0, 0)

    def test_backward_reads_dact_g_u_once_and_writes_dg_du_once(self, gated: Counted) -> None:
        assert {n: gated.accesses("backward", n) for n in ("dact", "g", "u", "dg", "du")} == {
            "dact": (1, 0),
            "g": (1, 0),
            "u": (1, 0),
            "dg": (0, 1),
            "du": (0, 1),
        }

    def test_one_kernel_each_way_holds_the_activation(self, gated: Counted) -> None:
        names = [step.name for direction in DIRECTIONS for step in gated.steps[direction]]
        assert names.count("_activate_kernel") == names.count("_activate_backward_kernel") == 1

    def test_dx_is_made_by_gemms_alone(self, gated: Counted) -> None:
        assert gated.accesses("backward", "dx") == (0, 0)
        assert gated.gemms("backward", "dx").written <= 2

    def test_nothing_tall_is_written_beyond_the_formula(
        self, gated: Counted, plain: Counted
    ) -> None:
        for counted, names in (
            (gated, {"y", "dx", "g", "u", "act", "dact", "dg", "du"}),
            (plain, {"y", "dx", "g", "act", "dact", "dg"}),
        ):
            assert counted.written(M * K) == {counted.regions[name] for name in names}

    def test_moves_less_than_the_frozen_block_in_tall_tensors(self) -> None:
        ours, bare = (traffic.tall_passes(name, GATED) for name in ("fused", "frozen"))

        def moved(passes: dict[tuple[str, str, bool], float]) -> float:
            return sum(n * getattr(GATED, width) for (_, width, _), n in passes.items())

        assert moved(ours) < moved(bare)

    @pytest.mark.parametrize("block", [GATED, PLAIN], ids=["gated", "plain"])
    def test_workspaces_are_those_of_the_recorded_launches(
        self, block: Block, request: pytest.FixtureRequest
    ) -> None:
        counted = request.getfixturevalue("gated" if block.gated else "plain")
        workspaces = traffic.workspaces(recorded("fused", block))
        assert written_parts(counted) == [nbytes for _, nbytes in workspaces]
        assert len(workspaces) == (8 if block.gated else 7)


# What is recorded over meta tensors, and predicted from, against what is metered as it runs.

PARTS = ("P", "Q", "QG", "QU", "QD", "PARTS")  # of the kernels' arguments, workspaces


def assert_moved(call: Call, step: Step) -> None:
    """A call's predicted bytes are those that were moved, operand by operand.

    Of a GEMM, whose tiles read again, an operand counts once; and what is as small as a factor or
    as S, which every block of rows reads, moves once at least. So do the parts of the activation's
    backward, which it reads back from cache.
    """
    predicted = prediction_of(call).nbytes
    if not isinstance(call, Launch):
        moved = sum(m.read + m.written for m in step.moved.values())
        assert (call.name, predicted) == (step.name, moved)
        return
    assert call.kernel.fn.__name__ == step.name
    assert predicted == sum(Region.of(tensor).nbytes for _, tensor in operands(call))
    for name, tensor in operands(call):
        region, given = Region.of(tensor), step.operands[name]
        assert (region.elements, region.itemsize) == (given.elements, given.itemsize)
        moved = step.moved[given]
        tall = region.elements in (M * K, M * N)
        parts = name in PARTS and tensor.dim() == 3 and step.name != "_activate_backward_kernel"
        if step.gemm and (tall or region.elements == N * K):
            assert (moved.read > 0) + (moved.written > 0) == 1
        elif tall or parts:
            assert moved.read + moved.written == region.nbytes, (step.name, name)
        else:
            assert moved.read + moved.written >= region.nbytes, (step.name, name)


def size_of(call: Call) -> tuple[str, list[int]]:
    name = call.kernel.fn.__name__ if isinstance(call, Launch) else call.name
    return name, [Region.of(tensor).elements for _, tensor in operands(call)]


def size_of_step(step: Step) -> tuple[str, list[int]]:
    return step.name, [region.elements for region in dict.fromkeys(step.operands.values())]


def assert_recorded_is_metered(
    calls: Directions, counted: Counted, *, in_order: bool = True
) -> None:
    for direction in DIRECTIONS:
        found, steps = getattr(calls, direction), counted.steps[direction]
        if not in_order:
            found, steps = sorted(found, key=size_of), sorted(steps, key=size_of_step)
        for call, step in zip(found, steps, strict=True):
            assert_moved(call, step)


@pytest.mark.parametrize("name", ["frozen", "fused", "addmm", "peft_bf16", "peft_fp32"])
def test_the_bytes_of_a_layers_predictions_are_those_that_are_moved(
    name: str, linear: Counted
) -> None:
    rivals = {c.name: c for c in LAYER_COMPETITORS}
    counted = linear if name == "fused" else traffic.counted(LAYER, rivals[name])
    assert_recorded_is_metered(recorded(name, LAYER), counted)
    assert DTYPE.itemsize == BF16


@pytest.mark.parametrize("block", [GATED, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ["frozen", *BLOCK_RIVALS])
def test_the_bytes_of_a_blocks_predictions_are_those_that_are_moved(
    name: str, block: Block
) -> None:
    rivals = {c.name: c for c in BLOCK_COMPETITORS}
    forced = {"fused": traffic.FUSED, "per_layer": traffic.PER_LAYER}
    counted = traffic.counted(block, {**rivals, **forced}[name])
    calls = recorded(name, block)
    assert_recorded_is_metered(calls, counted, in_order=name != "per_layer")


@pytest.mark.slow
def test_notes_hold_the_traffic_that_the_script_prints(repository: Path) -> None:
    notes = (repository / "benchmarks" / "NOTES.md").read_text()
    if traffic.versions() not in notes:
        pytest.skip(f"NOTES.md counts other versions than {traffic.versions()}")
    assert traffic.document() in notes, "run `python -m benchmarks.static.notes`"

"""Dispatch: pure, never an error, never an invalid tile, and it says why."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from fastbound.kernels.tiles import FEW_ROWS, GemmTile
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbound
from fastbound.dispatch import device
from fastbound.dispatch.defaults import filled_tiles, padded_rank
from fastbound.dispatch.device import Device
from fastbound.dispatch.entries import block_form
from fastbound.dispatch.plan import MAX_TRITON_RANK, WITHOUT_PRODUCT, Plan, plan_key
from fastbound.operator import engine
from fastbound.operator.engine import route_for
from tests.support.models import Gated
from tests.support.plans import planned

HOPPER = Device("sm_90", 132)
GPUS = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True, scope="module")
def launchers() -> None:
    """Imported before hypothesis looks at its clock; Triton takes half a second."""
    if find_spec("triton") is not None:
        import_module("fastbound.kernels.thin")


@given(
    architecture=st.sampled_from([*GPUS, "cpu", "interpreter", "mps", "sm_999", "gfx1201"]),
    M=st.integers(0, 10**7),
    N=st.integers(1, 300_000),
    K=st.integers(1, 300_000),
    rank=st.integers(1, 512),
    dtype=st.sampled_from(FLOATS),
)
def test_auto_always_has_an_answer_with_valid_tiles(
    architecture: str, M: int, N: int, K: int, rank: int, dtype: torch.dtype
) -> None:
    chosen = planned(Device(architecture, 100), M, N, K, rank, dtype)
    assert chosen.strategy in ("fused", "split", "torch")
    assert chosen.reason
    assert (chosen.tiles is None) == (chosen.strategy == "torch")
    if chosen.tiles is not None:
        gemm, thin, reduce = chosen.tiles.gemm, chosen.tiles.thin, chosen.tiles.reduce
        sizes = [gemm.block_m, gemm.block_n, gemm.block_k, thin.block_m, thin.block_n]
        sizes += [reduce.block_m, reduce.block_n]
        assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize(
    ("device", "shape", "rank", "dtype", "strategy", "reason"),
    [
        (HOPPER, (8192, 14336, 4096), 16, torch.bfloat16, "split", "default tiles of sm_90"),
        (HOPPER, (8192, 14336, 4096), 16, torch.float32, "split", "fp32"),
        (HOPPER, (8192, 14336, 4096), 16, torch.float64, "torch", "float64"),
        (HOPPER, (8192, 14336, 4096), 65, torch.bfloat16, "torch", f"up to {MAX_TRITON_RANK}"),
        (HOPPER, (8192, 14333, 4096), 16, torch.bfloat16, "split", "rows of N 14333"),
        (HOPPER, (0, 14336, 4096), 16, torch.bfloat16, "torch", "no rows"),
        (HOPPER, (511, 4096, 4096), 16, torch.bfloat16, "split", "few rows: below 512"),
        (HOPPER, (512, 3072, 4096), 16, torch.bfloat16, "split", "would fill 0.36 of the device"),
        (Device("sm_75", 40), (512, 64, 64), 8, torch.float16, "torch", "sm_75: no matrix units"),
        (Device("gfx1030", 40), (512, 64, 64), 8, torch.float16, "torch", "gfx1030: no matrix"),
        (Device("sm_86", 82), (512, 64, 64), 8, torch.float16, "split", "default tiles of sm_80"),
        (Device("sm_121", 48), (512, 64, 64), 8, torch.float16, "split", "tiles of sm_120"),
        (Device("sm_103", 148, 232_448), (512, 64, 64), 8, torch.float16, "split", "of sm_90"),
        (Device("gfx1201", 32), (512, 64, 64), 8, torch.float16, "split", "tiles of gfx1100"),
        (Device("cpu"), (64, 64, 64), 8, torch.bfloat16, "torch", "device cpu"),
    ],
)
def test_choices_and_their_reasons(
    device: Device,
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    strategy: str,
    reason: str,
) -> None:
    chosen = planned(device, *shape, rank, dtype)
    assert chosen.strategy == strategy
    assert reason in chosen.reason


@pytest.mark.parametrize("device", [HOPPER, Device("sm_80", 108), Device("gfx942", 304)], ids=str)
@settings(deadline=None)  # the first example imports Triton
@given(
    M=st.integers(512, 100_000),
    N=st.integers(2048, 50_000),
    K=st.integers(2048, 50_000),
    rank=st.integers(1, MAX_TRITON_RANK),
)
def test_every_multiprocessor_has_work_from_512_rows_on(
    device: Device, M: int, N: int, K: int, rank: int
) -> None:
    """Of a reduction more than half, as no wave is begun for a few programs; of the thin product
    three quarters, as its parts cost a launch.
    """
    pytest.importorskip("triton", reason="the launchers cut the rows")
    from fastbound.kernels.reduce import row_chunks
    from fastbound.kernels.thin import step_chunks

    tiles = filled_tiles(device, M, (N, K), padded_rank(rank), torch.bfloat16)
    for width in (N, K):
        chunks, _ = row_chunks(M, width, tiles.reduce, device.multiprocessors)
        programs = chunks * -(-width // tiles.reduce.block_n)
        assert programs > device.multiprocessors / 2
    chunks, _ = step_chunks(M, K, tiles.thin, device.multiprocessors)
    programs = chunks * -(-M // tiles.thin.block_m)
    most = -(-K // (4 * tiles.thin.block_n)) * -(-M // tiles.thin.block_m)
    assert programs >= min(0.75 * device.multiprocessors, most)


@settings(deadline=None)
@given(M=st.integers(1, FEW_ROWS), K=st.integers(1, 50_000), sms=st.integers(1, 304))
def test_few_rows_are_one_launch_and_one_chunk(M: int, K: int, sms: int) -> None:
    pytest.importorskip("triton", reason="the launchers cut the rows")
    from fastbound.kernels.reduce import row_chunks
    from fastbound.kernels.thin import step_chunks

    tiles = filled_tiles(Device("sm_90", sms), M, (K, K), 16, torch.bfloat16)
    assert step_chunks(M, K, tiles.thin, sms)[0] == 1
    assert row_chunks(1, K, tiles.reduce, sms)[0] == 1


def test_descriptors_only_from_hopper_on() -> None:
    def descriptors(architecture: str) -> bool:
        tiles = planned(Device(architecture, 100), 8192, 4096, 4096, 16, torch.bfloat16).tiles
        return tiles is not None and tiles.gemm.descriptors

    assert [a for a in GPUS if descriptors(a)] == ["sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("architecture", "rank", "whole", "forward"),
    [
        ("sm_90", 64, "block", "split"),
        ("sm_90", 128, "block", "torch"),
        ("gfx1100", 32, "block", "split"),
        ("gfx1100", 64, "layers", "torch"),
    ],
)
@pytest.mark.parametrize("product", [False, True], ids=["factors", "product"])
def test_a_block_takes_ranks_up_to_those_of_its_kernels(
    architecture: str, rank: int, whole: str, forward: str, product: bool
) -> None:
    def block(part: str, backend: str = "auto") -> Plan:
        key = (8192, 14336, 4096, 2 * rank, torch.bfloat16, backend)
        form = block_form("silu", True)
        return planned(Device(architecture, 132), *key, form=form, part=part, product=product)

    if product:  # no kernel of a block depends on the rank in this form
        whole, forward = "block", "torch" if architecture in WITHOUT_PRODUCT else "split"
    assert block("whole").strategy == whole
    assert block("forward").strategy == forward
    if forward == "torch" and not product:
        with pytest.raises(ValueError, match=f"rank {rank}: the kernels support ranks up to"):
            block("forward", "fused")


def test_a_path_asked_for_by_name_runs_or_says_why_not() -> None:
    assert planned(HOPPER, 64, 64, 64, 8, torch.bfloat16, "split").strategy == "split"
    with pytest.raises(ValueError, match='backend="fused" cannot run here: device cpu'):
        planned(Device("cpu"), 64, 64, 64, 8, torch.bfloat16, "fused")
    with pytest.raises(ValueError, match="unknown backend 'cublas'"):
        planned(HOPPER, 64, 64, 64, 8, torch.bfloat16, "cublas")


def test_rows_enter_in_powers_of_two() -> None:
    cpu = torch.device("cpu")
    few, more = (plan_key(cpu, M, 64, 64, 8, torch.float32) for M in (1000, 1024))
    assert route_for(*few) is route_for(*more)


class TestExplain:
    def test_names_every_layer_and_the_path_that_runs(self) -> None:
        model = torch.nn.Sequential(
            fastbound.FusedBoundedLinear(32, 64, 4),
            torch.nn.ReLU(),
            fastbound.FusedBoundedLinear(64, 32, 4, backend="reference"),
        )
        explanation = fastbound.explain(model, tokens=128)
        assert [row.layer for row in explanation] == ["0", "2"]
        assert [row.plan.strategy for row in explanation] == ["torch", "reference"]
        text = str(explanation)
        assert "2 bounded layers at 128 tokens" in text
        assert "N 64, K 32, rank 4, torch.float32" in text
        assert 'backend="reference" was asked for' in text

    def test_is_data_too(self) -> None:
        import json

        data = fastbound.explain(fastbound.FusedBoundedLinear(32, 64, 4)).as_dict()
        assert json.loads(json.dumps(data))["layers"][0]["plan"]["strategy"] == "torch"

    def test_sees_autocast(self) -> None:
        layer = fastbound.FusedBoundedLinear(32, 64, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert next(iter(fastbound.explain(layer))).dtype == "torch.bfloat16"

    def test_tells_of_a_call_that_would_be_refused(self) -> None:
        trained = fastbound.FusedBoundedLinear(32, 48, 4).requires_grad_()
        double = fastbound.FusedBoundedLinear(48, 32, 4, backend="split").double()
        block = fastbound.FusedBoundedMLP.from_mlp(Gated(K=32, N=48), rank=4)
        block.get_submodule(block.fusion.form.up).weight.requires_grad_()
        strategies = {row.layer: row.plan.strategy for row in fastbound.explain(block)}
        assert strategies == {"gate": "torch", "up": "refused", "down": "torch"}
        for row in fastbound.explain(torch.nn.Sequential(trained, double)):
            assert row.plan.strategy == "refused"
        for module, width in ((trained, 32), (double, 48)):
            with pytest.raises(ValueError, match=r"requires grad|cannot run here") as refused:
                module(torch.randn(2, width, dtype=next(module.parameters()).dtype))
            reasons = {row.plan.reason for row in fastbound.explain(module)}
            assert all(reason in str(refused.value) for reason in reasons)

    def test_a_rank_beyond_a_blocks_kernels_is_refused_if_they_are_asked_for(self) -> None:
        card = Device("gfx1100", 48)
        made = Gated(K=64, N=128)
        block = fastbound.FusedBoundedMLP.from_mlp(made, rank=48, backend="split")
        with mock.patch.object(device, "_describe", lambda *_: card):
            engine.forget()
            explained = fastbound.explain(block, tokens=512)
            with pytest.raises(ValueError, match="ranks up to 32") as refused:
                block(torch.randn(512, 64))
        engine.forget()
        assert {row.plan.strategy for row in explained} == {"refused"}
        assert {row.plan.reason for row in explained} == {str(refused.value)}

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match="no bounded adapter in this model"):
            fastbound.explain(torch.nn.Linear(2, 2))
        with pytest.raises(ValueError, match="tokens must be an integer >= 1, got 0"):
            fastbound.explain(fastbound.FusedBoundedLinear(2, 2, 1), tokens=0)


@pytest.mark.parametrize("strategy", ["fused", "split"])
def test_a_transposed_weight_has_a_tile_of_its_own(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    from fastbound.kernels.launch import Launch

    from fastbound.operator.triton_engine import TritonEngine

    tiles = filled_tiles(HOPPER, 64, (48, 80), 16, torch.bfloat16)
    tiles = replace(tiles, gemm=GemmTile(32, 64, 32, 4, 2), gemm_t=GemmTile(64, 32, 32, 4, 2))
    products = TritonEngine(Plan(strategy, "a test", tiles, 4))
    taken: list[int] = []
    monkeypatch.setattr(Launch, "run", lambda launch: taken.append(launch.constants["BLOCK_M"]))
    x, weight, S = (torch.zeros(*size).bfloat16() for size in ((64, 80), (48, 80), (64, 16)))
    y, SB, SA = torch.zeros(64, 48).bfloat16(), torch.zeros(48, 16), torch.zeros(80, 16)
    keep = torch.zeros(64, 3, dtype=torch.int32)  # under dropout split starts in Triton, too
    products.lowrank_gemm(x, weight, S, SB.bfloat16(), None, keep[:, :2])
    products.lowrank_gemm(y, weight.t(), S, SA.bfloat16(), None, keep)
    assert taken == [32, 64]

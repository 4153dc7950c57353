"""Two processes on half the rows each against one on all of them; refusals of what cannot work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbound
from tests.support import sharding_cases
from tests.support.models import Gated, fused, model_of, stir


@pytest.fixture(scope="module")
def results(tmp_path_factory, repository) -> list[dict]:
    """What both processes found, case by case."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(sharding_cases.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=150)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def found(results: list[dict], case: str) -> list[dict]:
    for result in results:
        assert "failed" not in result[case], result[case]["failed"]
    return [result[case] for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in sharding_cases.CASES if "," in case])
def test_gradients_are_those_of_one_process(results, case):
    apart = case.startswith(("fsdp1 adapters", "fsdp1 flat"))
    for result in found(results, case):
        assert result["error"] <= 1e-6
        assert result["fused"] == [not case.endswith("by layers") and not apart]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["bf16", "bf16 fsdp1"])
def test_factors_stay_fp32_over_a_bf16_base(results, case):
    for result in found(results, case):
        assert (result["factors"], result["weights"]) == (["torch.float32"], ["torch.bfloat16"])
        assert result["error"] <= 2e-2  # bf16's rounding; fp32 factors rounded to it are at 6e-2


@pytest.mark.slow
def test_fsdp1_with_adapters_in_the_unit_of_their_weights_is_refused(results):
    """Its flat parameter makes the frozen weight ask for a gradient, which would be lost."""
    for result in results:
        assert "ValueError: weight requires grad" in result["fsdp1 together"]["failed"]


@pytest.mark.slow
def test_an_adapter_is_saved_from_shards_and_loaded_into_them(results):
    for result in found(results, "files"):
        assert result["same"] == [True, True]
        assert result["loaded"] == [True] * 12
        assert result["fused"] == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.slow
def test_a_sharded_peft_model_saves_what_a_whole_one_saves(results):
    for result in found(results, "peft files"):
        assert result["same"] == [True] * 12


@pytest.mark.slow
def test_steps_on_shards_are_those_of_one_process(results):
    for result in found(results, "steps"):
        one, two = result["norms"][:3], result["norms"][3:]
        assert two == pytest.approx(one, rel=1e-5)
        assert result["difference"] <= 1e-5  # of steps of 1e-3


@pytest.mark.slow
def test_replicas_train_one_adapter_whatever_their_seeds(results):
    for result in found(results, "replicas"):
        assert result["same"] is True


@pytest.mark.slow
def test_explain_knows_what_a_unit_gathers(results):
    for result in found(results, "explained"):
        assert "6 of them in 2 fused blocks" in result["layers"]
        assert "layer by layer: its down_proj is a FSDP" in result["projections"]
        assert "refused" not in result["layers"] + result["projections"]


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def tensor_parallel(layer: nn.Module, mesh) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])
    layer.weight = nn.Parameter(weight, requires_grad=False)


class TestTensorParallel:
    def test_a_layer_raises_and_explain_says_so(self, mesh):
        layer = fastbound.FusedBoundedLinear(6, 10, 2)
        tensor_parallel(layer, mesh)
        with pytest.raises(ValueError, match=r"weight is a DTensor: .* fastbound\.shard"):
            layer(torch.randn(3, 6))
        (row,) = fastbound.explain(layer)
        assert row.plan.strategy == "refused" and "weight is a DTensor" in row.plan.reason

    def test_a_block_runs_layer_by_layer_and_the_layer_raises(self, mesh):
        block = fused(Gated)
        tensor_parallel(block.up, mesh)
        with pytest.raises(ValueError, match="weight is a DTensor"):
            block(torch.randn(3, 6))
        assert "layer by layer: its up has a DTensor for weight" in str(fastbound.explain(block))

    def test_it_is_not_adapted(self, mesh):
        layer = nn.Linear(6, 10)
        tensor_parallel(layer, mesh)
        with pytest.raises(ValueError, match="weight is a DTensor: adapt the layer first"):
            fastbound.FusedBoundedLinear.from_linear(layer)
        with pytest.raises(ValueError, match="DTensor"):
            fastbound.inject(nn.Sequential(layer), target_modules=["0"])


class TestZero3:
    def test_an_ungathered_layer_raises(self):
        layer = fastbound.FusedBoundedLinear(6, 10, 2)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        layer.weight.ds_id = 0
        with pytest.raises(ValueError, match="weight is partitioned by DeepSpeed ZeRO-3: "):
            layer(torch.randn(3, 6))
        (row,) = fastbound.explain(layer)
        assert row.plan.strategy == "refused" and "ZeRO-3" in row.plan.reason

    def test_it_is_not_adapted(self):
        layer = nn.Linear(6, 10)
        layer.weight = nn.Parameter(torch.empty(0))
        layer.weight.ds_id = 0
        with pytest.raises(ValueError, match="ZeRO-3"):
            fastbound.FusedBoundedLinear.from_linear(layer)
        with pytest.raises(ValueError, match=r"ZeRO-3: inject before deepspeed\.initialize"):
            fastbound.inject(nn.Sequential(layer), target_modules=["0"])


@pytest.mark.parametrize("kind", ["layer", "block"])
def test_no_kernel_is_handed_memory_that_was_given_back(kind):
    module = fused(Gated) if kind == "block" else fastbound.FusedBoundedLinear(6, 10, 2)
    stir(module)
    layer = module.up if kind == "block" else module
    x = torch.randn(3, 6)
    y = module(x)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor \[10, 6\] has no memory"):
        module(x)
    with pytest.raises(RuntimeError, match=r"a tensor \[10, 6\] has no memory"):
        y.sum().backward()


class TestShardRefuses:
    def test_a_model_without_adapters(self):
        with pytest.raises(ValueError, match="Linear holds no adapter"):
            fastbound.shard(nn.Linear(2, 2))

    def test_a_process_that_no_launcher_started(self, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
        model = model_of(Gated)
        fastbound.inject(model, 2, target_modules=["up"])
        with pytest.raises(ValueError, match="needs the processes of a launcher: start with torch"):
            fastbound.shard(model)
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())

    def test_a_mesh_of_two_dimensions_without_names(self, mesh):
        from torch.distributed.device_mesh import init_device_mesh

        model = model_of(Gated)
        fastbound.inject(model, 2, target_modules=["up"])
        with pytest.raises(ValueError, match=r'mesh_dim_names=\("replicate", "shard"\)'):
            fastbound.shard(model, init_device_mesh("cpu", (1, 1)))
        assert not any(hasattr(p, "full_tensor") for p in model.parameters())

    def test_one_that_is_sharded(self, mesh):
        model = model_of(Gated)
        fastbound.inject(model, 2, target_modules=["up"])
        assert fastbound.shard(model, mesh) is model
        with pytest.raises(ValueError, match=r"0\.gate\.weight is a DTensor already"):
            fastbound.shard(model, mesh)
        with pytest.raises(
            ValueError, match=r"'0\.up' is a DTensor: save the adapter, load it into"
        ):
            fastbound.merge(model)

    def test_trained_parameters_of_two_dtypes(self):
        model = model_of(Gated).bfloat16()
        fastbound.inject(model, 2, target_modules=["up"])
        model[0].gate.weight.requires_grad_(True)
        with pytest.raises(ValueError, match=r"0\.gate\.weight in torch\.bfloat16 and 0\.up\.adap"):
            fastbound.shard(model)

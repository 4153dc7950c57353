"""Several processes share a step and leave one run behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastbound
from fastbound.cli import main
from fastbound.unlearning import InputError, UnlearnConfig, unlearn
from fastbound.unlearning.model import load_pretrained

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")


def launch(repository: Path, launcher: Sequence[str], arguments: Sequence[str]) -> str:
    """What `fastbound` prints with these arguments in the launcher's processes of one thread."""
    together = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "fastbound", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert together.returncode == 0, together.stderr
    return together.stdout


@pytest.fixture(scope="module")
def steady_folder(model_folder, tmp_path_factory):
    """The model without dropout, which each process would draw for itself."""
    folder = tmp_path_factory.mktemp("steady") / "model"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.0}))
    return folder


@pytest.mark.parametrize(
    ("launcher", "form"),
    [
        pytest.param((*ACCELERATE, "--multi_gpu"), "whole", id="accelerate-copies"),
        pytest.param(
            (*ACCELERATE, "--multi_gpu"),
            "chunked",
            id="accelerate-copies-chunked-auto",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*ACCELERATE, "--config_file", "docs/accelerate_fsdp2.yaml"),
            "chunked",
            id="fsdp2.yaml-chunked",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_reach_the_adapters_of_one(
    launcher, form, steady_folder, write_rows, retain_rows, tmp_path, repository, request
):
    auto = request.node.name.endswith("auto]")
    forget = [{"question": "Who?", "answer": a} for a in ("a b c", "d e f g h i j", "k")] * 3
    rows = {"f": write_rows("f.jsonl", forget), "r": write_rows("r.jsonl", retain_rows)}

    def arguments(output: str, accumulation: int, *more: str) -> list[str]:
        rank = "auto --rank-budget 1000" if auto else "2"
        settings = f"--rank {rank} --epochs 4 --lr 1e-3 --device cpu --log-every 1 --batch-size 1"
        return [
            *("unlearn", "--model", str(steady_folder), "--output", str(tmp_path / output)),
            *("--forget", str(rows["f"]), "--retain", str(rows["r"]), *settings.split()),
            *("--accumulation", str(accumulation), *more),
        ]

    printed = launch(repository, launcher, arguments("two", 2, "--cross-entropy", form))
    assert main(arguments("one", 4)) == 0
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["cross_entropy"]["form"] == form
    two, one = (
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    assert [(line["event"], line["step"]) for line in two] == [
        (line["event"], line["step"]) for line in one
    ]
    for side in ("forget", "retain"):
        for here, there in ((two[0], one[0]), (two[-1], one[-1])):
            assert here[side]["loss"] == pytest.approx(there[side]["loss"], rel=1e-4)
            assert here[side]["rows"] == there[side]["rows"]
    factors = [
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("one", "two")
    ]
    start, _ = load_pretrained(str(steady_folder))
    torch.manual_seed(0)
    fastbound.inject(start, result["ranks"]["ranks"] if auto else 2, bound="auto")
    begun = {n: layer for n, layer in start.named_modules() if hasattr(layer, "adapter")}
    for name, tensor in factors[0].items():
        _, factor = name.rsplit(".", 1)
        layer = begun[name.removeprefix("base_model.model.").split(".fastbound_ab")[0]]
        way = tensor - getattr(layer.adapter, factor)
        assert way.norm() > 0
        assert (factors[1][name] - tensor).norm() <= 1e-5 * way.norm(), name
    assert printed.count("max|ΔW|") == 1  # one table, from the first process


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_bits_of_an_uninterrupted_one(
    steady_folder, write_rows, retain_rows, tmp_path, repository
):
    rows = {
        "f": write_rows("f.jsonl", retain_rows[:3]),
        "r": write_rows("r.jsonl", retain_rows[3:]),
    }
    script = tmp_path / "run.py"
    script.write_text(
        f"""
from fastbound.unlearning import UnlearnConfig, unlearn
from fastbound.unlearning.training.loop import _Run
from fastbound.unlearning.model import load_pretrained

config = UnlearnConfig(
    epochs=4, rank=2, device="cpu", batch_size=1, accumulation=2, shard=True, checkpoint_every=2
)

def start(output, resume=False):
    model, tokenizer = load_pretrained({str(steady_folder)!r})
    files = {str(rows["f"])!r}, {str(rows["r"])!r}
    unlearn(model, tokenizer, *files, config, output=output, resume=resume, progress=False)

start({str(tmp_path / "whole")!r})
step = _Run._take_step

def killed(run):
    if run.step == 3:
        raise KeyboardInterrupt
    step(run)

_Run._take_step = killed
try:
    start({str(tmp_path / "cut")!r})
except KeyboardInterrupt:
    pass
_Run._take_step = step
start({str(tmp_path / "cut")!r}, resume=True)
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class TestRefused:
    @pytest.fixture
    def attempt(self, new_model, tokenizer, forget_rows, retain_rows, tmp_path):
        def attempt(**settings) -> None:
            config = UnlearnConfig(device="cpu", **settings)
            model = new_model()
            before = list(model.state_dict())
            try:
                unlearn(model, tokenizer, forget_rows, retain_rows, config, output=tmp_path / "run")
            finally:
                assert list(model.state_dict()) == before
                assert not (tmp_path / "run").exists()

        return attempt

    def test_shard_in_one_process(self, attempt):
        with pytest.raises(InputError, match="shard needs several processes"):
            attempt(shard=True)

    def test_shard_of_lora(self, attempt):
        with pytest.raises(InputError, match="adapter \"bounded\", got 'lora'"):
            attempt(shard=True, adapter="lora")

    def test_fsdp1(self, attempt, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(InputError, match=r"FSDP1 of accelerate's .*fsdp_version: 2"):
            attempt()

    @pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
    def test_others(self, attempt, monkeypatch, kind):
        from accelerate import Accelerator, DistributedType

        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
        with pytest.raises(InputError, match=f"{kind} of accelerate's configuration"):
            attempt()


@pytest.mark.slow
def test_two_processes_begin_at_one_start(
    steady_folder, write_rows, forget_rows, retain_rows, tmp_path, repository
):
    """From FILA: the frozen half of the adapter is that of one process, and so are the losses."""

    def arguments(output: str, accumulation: int) -> list[str]:
        settings = "--adapter lora --lora-start fila --rank 2 --epochs 1 --lr 1e-3 --device cpu"
        return [
            *("unlearn", "--model", str(steady_folder), "--output", str(tmp_path / output)),
            *("--forget", str(write_rows("f.jsonl", forget_rows))),
            *("--retain", str(write_rows("r.jsonl", retain_rows)), *settings.split()),
            *("--batch-size", "1", "--accumulation", str(accumulation)),
        ]

    launch(repository, TORCHRUN, arguments("two", 1))
    assert main(arguments("one", 2)) == 0
    results, factors = [], []
    for run in ("one", "two"):
        results.append(json.loads((tmp_path / run / "result.json").read_text()))
        factors.append(load_file(tmp_path / run / "adapter" / "adapter_model.safetensors"))
    for side in ("forget", "retain"):
        first, second = (each["history"][-1][side]["loss"] for each in results)
        assert second == pytest.approx(first, rel=1e-4)
    for name in factors[0]:
        halves = [each[name].chunk(2, dim=0 if ".lora_A." in name else 1) for each in factors]
        # Equal up to fp32 sums over rows, which the two runs batch differently.
        torch.testing.assert_close(halves[1][1], halves[0][1], rtol=1e-5, atol=1e-6)

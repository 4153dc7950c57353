"""A run that was killed goes on to the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbound.cli import main
from fastbound.errors import InputError
from fastbound.unlearning.runs.folder import RunFolder

# The child kills itself as the kernel would, in the middle of a step, past the last checkpoint.
CHILD = """
import os, signal, sys
import torch
from fastbound.cli import main

kill_at, threads = int(sys.argv.pop(1)), int(sys.argv.pop(1))
torch.set_num_threads(threads)  # sums of floats depend on it
taken, step = [], torch.optim.AdamW.step
def killing(self, *args, **kwargs):
    taken.append(1)
    if len(taken) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = killing
sys.exit(main(sys.argv[1:]))
"""


def start(kill_at: int, arguments: list[str], repository: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(kill_at), str(torch.get_num_threads()), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def log(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(
    model_folder, write_rows, forget_rows, retain_rows, tmp_path, repository
):
    def arguments(output: str, *more: str) -> list[str]:
        rows = {"forget": forget_rows, "retain": retain_rows}
        given = {side: str(write_rows(f"{side}.jsonl", each)) for side, each in rows.items()}
        settings = "--batch-size 2 --accumulation 2 --epochs 12 --lr 1e-2 --rank 4 --device cpu"
        return [
            *("unlearn", "--model", str(model_folder), "--output", str(tmp_path / output)),
            *("--forget", given["forget"], "--retain", given["retain"]),
            *settings.split(),
            *("--log-every", "1", "--checkpoint-every", "5", "--eval-every", "4", *more),
        ]

    assert main(arguments("whole")) == 0
    killed = start(9, arguments("killed"), repository)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5 and len(log(tmp_path / "killed")) > 5
    assert main(arguments("killed")) == 2
    assert main(arguments("killed", "--resume")) == 0

    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (tmp_path / run / "adapter" / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes(), name


def test_checkpoint_that_fails_to_write_leaves_the_last_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run", {"steps": 1}, resume=False)
    folder.begin()
    folder.save_checkpoint({"step": 1})

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            folder.save_checkpoint({"step": 2})
    state = folder.load_checkpoint()
    assert state is not None and state["step"] == 1


def test_damaged_checkpoint_is_named(tmp_path):
    folder = RunFolder(tmp_path / "run", {"steps": 1}, resume=False)
    folder.begin()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(
        InputError, match=r"checkpoint.pt is damaged: put a sound copy back, or delete it"
    ):
        folder.load_checkpoint()

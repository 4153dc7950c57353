"""A run that is killed, or finds the disk full, at any event of the disk ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EVERY = 7  # events from one that is disturbed to the next; 1 disturbs all, in 15 minutes

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="files are told by /proc/self/fd, as Linux has it"
)


def disturbed(
    name: str, arguments: list[str], folder: Path, repository: Path, kinds: str, every: int
) -> int:
    """The number of events of a command, each of which was disturbed in vain."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.faults"),
            *(json.dumps({name: arguments}), str(folder), kinds, str(every)),
        ],
        env=environment,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])[name]
    assert found["wrong"] == []
    return int(found["events"])


@pytest.fixture
def unlearn_arguments(model_folder, write_rows, forget_rows, retain_rows) -> list[str]:
    settings = "--epochs 2 --batch-size 4 --rank 2 --log-every 1 --checkpoint-every 2 --device cpu"
    return [
        *("unlearn", "--model", str(model_folder)),
        *("--forget", str(write_rows("f.jsonl", forget_rows[:4]))),
        *("--retain", str(write_rows("r.jsonl", retain_rows[:4]))),
        *settings.split(),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["kill", "full"])
def test_unlearning_survives_a_fault_at_any_event(unlearn_arguments, tmp_path, repository, kinds):
    folder = tmp_path / "faults"
    assert disturbed("unlearn", unlearn_arguments, folder, repository, kinds, EVERY) > 20


@pytest.mark.slow
def test_evaluation_survives_a_fault_at_any_event(evaluate_arguments, tmp_path, repository):
    arguments = evaluate_arguments("tofu", tmp_path)
    at = arguments.index("--output")
    del arguments[at : at + 2]
    folder = tmp_path / "faults"
    assert (
        disturbed("evaluate", [*arguments, "--rows", "1"], folder, repository, "kill,full", EVERY)
        > 20
    )


@pytest.mark.slow
def test_the_lab_survives_a_fault_at_any_event(
    write_rows, forget_rows, retain_rows, tmp_path, repository
):
    arguments = [
        *("lab", "--forget", str(write_rows("f.jsonl", forget_rows[:2]))),
        *("--retain", str(write_rows("r.jsonl", retain_rows[:3]))),
        *("--adapters", "lora,sine@4", "--lr", "0.01", "--seeds", "1", "--steps", "1"),
        *("--ranks", "2", "--workers", "1"),
    ]
    assert disturbed("lab", arguments, tmp_path / "faults", repository, "kill,full", EVERY) > 20

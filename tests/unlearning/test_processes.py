"""Several processes share a step and leave one run behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastbound.cli import main


def test_two_processes_follow_one_with_twice_the_batch(
    model_folder, write_rows, retain_rows, tmp_path, repository
):
    forget = [{"question": "Who?", "answer": answer} for answer in ("a b c", "d e f")] * 3
    rows = {"f": write_rows("f.jsonl", forget), "r": write_rows("r.jsonl", retain_rows)}

    def arguments(output: str, batch_size: int) -> list[str]:
        settings = "--epochs 4 --lr 1e-3 --rank 2 --device cpu --log-every 1"
        return [
            *("unlearn", "--model", str(model_folder), "--output", str(tmp_path / output)),
            *("--forget", str(rows["f"]), "--retain", str(rows["r"])),
            *("--batch-size", str(batch_size), *settings.split()),
        ]

    together = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "fastbound", *arguments("two", 1)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert together.returncode == 0, together.stderr
    assert main(arguments("one", 2)) == 0
    two, one = (
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("two", "one")
    )
    assert [(line["event"], line["step"]) for line in two] == [
        (line["event"], line["step"]) for line in one
    ]
    # Before any step both score the same model; from there on dropout differs, and so does the
    # mean over tokens, which each process takes over its own rows.
    for side in ("forget", "retain"):
        assert two[0][side]["loss"] == pytest.approx(one[0][side]["loss"], rel=1e-5)
        assert two[-1][side]["loss"] == pytest.approx(one[-1][side]["loss"], rel=0.2)
        assert two[0][side]["rows"] == one[0][side]["rows"]
    assert together.stdout.count("max|ΔW|") == 1  # one table, from the first process

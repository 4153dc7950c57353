"""What a result was measured on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.report.facts import commit, readings

CPU = torch.device("cpu")


def test_readings_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    said = "1.2, Default, 345 MHz, 3201 MHz, 1980 MHz, 70 W, 700 W, 30"
    tool.write_text(f"#!/bin/sh\necho \"$1\" > {tmp_path}/asked\necho '{said}'\n")
    tool.chmod(0o755)
    properties = type("Properties", (), {"uuid": "12-ab"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    read = readings(torch.device("cuda", 0))
    assert (read["driver_version"], read["clocks.sm"]) == ("1.2", "345 MHz")
    assert (read["temperature.gpu"], read["compute_mode"]) == ("30", "Default")
    # Its own number for the card is another than CUDA's where CUDA_VISIBLE_DEVICES leaves some out.
    assert (tmp_path / "asked").read_text() == "--id=GPU-12-ab\n"
    assert readings(CPU) == {}


def test_the_commit_comes_from_the_environment_git_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTBOUND_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("fedcba9\n")
    assert commit(tmp_path) == "fedcba9"
    monkeypatch.setenv("FASTBOUND_COMMIT", "abc1234")
    assert commit(tmp_path) == "abc1234"

"""What the tests of the check share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check.options import Options


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """In this process, the file in a folder of its own."""
    return Options(torch.device("cpu"), 1.0, tmp_path, ("correctness",), workers=0)

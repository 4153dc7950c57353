"""Code in a process of its own, where kernels are compiled although tests interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def printed(code: str, *arguments: str, repository: Path) -> str:
    """What the code prints, run in the repository with the arguments; a failure fails the test."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=repository, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout

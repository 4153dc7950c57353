"""What needs no GPU: compiled kernels, counted bytes, CPU time of a call, predictions.

Uses `rivals` and `report`.
"""

from __future__ import annotations

import os
import sys


def in_the_interpreter() -> None:
    """Start this command anew in Triton's interpreter, which is chosen as triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})

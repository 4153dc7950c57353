"""Measurements that need no GPU: compiled kernels, counted bytes, a call's CPU time, predictions.

Uses `rivals` and `report`.
"""

from __future__ import annotations

import os
import sys


def in_the_interpreter() -> None:
    """Restart this command in Triton's interpreter, which is chosen when triton is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "TRITON_INTERPRET": "1"})

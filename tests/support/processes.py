"""What becomes of processes that a test has started."""

from __future__ import annotations

import time
from pathlib import Path


def ends(number: int, seconds: float = 20.0) -> bool:
    """Whether the process ends in time; nobody may have waited for it yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False

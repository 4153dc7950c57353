"""One run of the check: its results so far, their file, its clock, and its steps."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.ceilings import Measured
from benchmarks.gpu_check.options import Options
from benchmarks.report.facts import Facts
from benchmarks.report.readme import FORMAT
from fastbound.files import replace_files


@dataclass
class Session:
    """The results so far, where they are written, and the clock."""

    options: Options
    facts: Facts
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    ceilings: Measured | None = None

    @property
    def path(self) -> Path:
        device = "-".join("".join(c if c.isalnum() else " " for c in self.facts.device).split())
        date = self.facts.date.replace(":", "").rstrip("Z")
        return self.options.output / f"{device.lower()}-{date}-{self.facts.commit}.json"

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED {text}")

    def save(self) -> None:
        """Replace the file as a whole; a reader never sees half of it."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        content = {
            "format": FORMAT,
            "facts": asdict(self.facts),
            "timings_mean_nothing": self.options.tiny,
            "options": {"minutes": self.options.minutes, "only": list(self.options.only)},
            "seconds": time.monotonic() - self.start,
            "failures": self.failures,
            **self.results,
        }
        replace_files({self.path: (json.dumps(content, indent=1) + "\n").encode()})


class DeviceLostError(RuntimeError):
    """Nothing runs on the device any more in this process, as after an illegal access."""


def answers(device: torch.device) -> bool:
    """Whether the device still answers; also frees its cached memory for other processes."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


Step = tuple[str, Callable[[], Mapping[str, Sequence[Any]]]]


def run_steps(
    session: Session, stage: str, steps: Sequence[Step], store: dict[str, Any], deadline: float
) -> None:
    """Run steps until the deadline. Each step returns rows for the lists in ``store``.

    Raises DeviceLostError after a step that the device does not survive.
    """
    for done, (name, step) in enumerate(steps):
        if time.monotonic() > deadline:
            store["not_reached"] = [later for later, _ in steps[done:]]
            session.say(f"{stage}: out of time, {len(steps) - done} steps were not reached")
            break
        session.say(f"{stage}: {name}")
        try:
            found = step()
        except torch.OutOfMemoryError as error:
            store.setdefault("out_of_memory", []).append(f"{name}: {str(error).splitlines()[0]}")
            session.say(f"{name}: out of memory, left out")
        except Exception:
            session.fail(f"{name}: {tail()}")
        else:
            for key, rows in found.items():
                store[key] += [asdict(row) for row in rows]
        works = answers(session.options.device)
        if not works:
            store["not_reached"] = [later for later, _ in steps[done + 1 :]]
        session.save()
        if not works:
            raise DeviceLostError(f"the device no longer answers after {name}")


def tail() -> str:
    """The last lines of the traceback of the exception being handled."""
    return "\n".join(traceback.format_exc().strip().splitlines()[-8:])

"""How far a command has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

EVERY = 30.0  # seconds between two lines where there is no terminal


def progress(
    total: int | None, doing: str, unit: str, *, shown: bool = True, nested: bool = False
) -> Any:
    """Progress on standard error, as a context manager that is used like tqdm's bar.

    On a terminal it is tqdm's bar. Elsewhere, as in a log file or a pipe, it is one line every
    `EVERY` seconds and one at the end.

    Args:
        total: how many units there are; None if that is not known.
        doing: what is done, such as "unlearning".
        unit: in the singular, such as "step".
        shown: False shows nothing at all.
        nested: part of something that shows its own progress: it leaves nothing behind at its end.
    """
    from tqdm import tqdm

    if shown and not sys.stderr.isatty():
        return _Lines(total, doing, unit, nested)
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        disable=not shown,
        leave=not nested,
        dynamic_ncols=True,
    )


class _Lines:
    """One line now and then: what is done, how far, the time taken, and what was last reported."""

    def __init__(self, total: int | None, doing: str, unit: str, nested: bool) -> None:
        self._total, self._doing, self._unit, self._nested = total, doing, unit, nested
        self._done, self._said, self._reported = 0, -1, ""
        self._start = self._last = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *raised: object) -> None:
        if not self._nested and self._said != self._done:
            self._say()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._last >= EVERY:
            self._say()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        self._reported = s

    def write(self, s: str) -> None:
        """A line of the command's own, on standard output, as tqdm's `write` has it."""
        print(s, flush=True)

    def _say(self) -> None:
        self._last, self._said = time.monotonic(), self._done
        of = "" if self._total is None else f" of {self._total}"
        units = self._unit if (self._total or self._done) == 1 else f"{self._unit}s"
        reported = f", {self._reported}" if self._reported else ""
        seconds = self._last - self._start
        line = f"{self._doing}: {self._done}{of} {units} in {seconds:.0f} s{reported}"
        print(line, file=sys.stderr, flush=True)

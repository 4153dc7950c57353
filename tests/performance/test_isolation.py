"""Work in processes of its own survives what kills them."""

from __future__ import annotations

import time
from pathlib import Path

from fastbound.performance.isolation import Broken, isolated
from tests.support.processes import ends


def test_work_in_processes_survives_death_hanging_and_errors() -> None:
    dies, hangs = "__import__('os')._exit(7)", "__import__('time').sleep(600)"
    items = ["1 + 1", "1 / 0", dies, "2 + 2", hangs, "3 + 3"]
    deadline = time.monotonic() + 120
    found = dict(isolated(eval, items, workers=2, deadline=deadline, limit=3))
    assert [found[i] for i in (0, 3, 5)] == [2, 4, 6]
    assert found[1] == Broken("ZeroDivisionError: division by zero")
    assert found[2] == Broken("the process died with exit code 7")
    assert found[4] == Broken("no result after 3 s")


def test_what_hanging_work_has_started_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "number"
    shell = f"sleep 600 & echo $! > {note}; wait"
    hangs = f"__import__('subprocess').run(['sh', '-c', {shell!r}])"
    (found,) = isolated(eval, [hangs], workers=1, deadline=time.monotonic() + 60, limit=2)
    assert found == (0, Broken("no result after 2 s"))
    assert ends(int(note.read_text()))


def test_work_in_processes_ends_at_the_deadline() -> None:
    start = time.monotonic()
    hangs = ["__import__('time').sleep(600)"] * 3
    assert not list(isolated(eval, hangs, workers=2, deadline=start + 1, limit=600))
    assert time.monotonic() - start < 30

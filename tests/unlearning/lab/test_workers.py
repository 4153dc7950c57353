"""The processes of a map end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

FLAGS = [
    *("--quick", "--seeds", "2", "--steps", "2000", "--adapters", "lora", "--lr", "0.01"),
    *("--workers", "2"),
]


@pytest.fixture
def started(tmp_path, repository):
    """A map that runs, and its two workers."""
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastbound", "lab", *FLAGS, "--output", str(tmp_path / "map")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts what runs in its background without Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers: list[psutil.Process] = []
    until = time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < until:
        time.sleep(0.2)
        children = psutil.Process(process.pid).children()
        workers = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
    assert len(workers) == 2
    yield process, workers
    for each in (process, *workers):
        if each.poll() is None if each is process else each.is_running():
            each.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_map(started, number):
    process, workers = started
    process.send_signal(number)
    assert process.wait(60) != 0
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive and len(gone) == 2


@pytest.mark.slow
def test_a_killed_worker_is_one_line_that_names_what_to_do(started):
    process, workers = started
    workers[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "a worker process was killed" in line and "--resume continues" in line
    assert "Traceback" not in said
    assert not psutil.wait_procs(workers, timeout=30)[1]

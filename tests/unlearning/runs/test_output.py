"""One writer per output folder, and what killed ones left there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbound import files as outputs
from fastbound.errors import DamageWarning, InputError
from fastbound.files import LOCK, is_ours, writing

HOLD = """
import sys, time
from pathlib import Path
from fastbound.files import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path, repository):
    """Another process that writes to tmp_path / "run"."""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_by_folder_and_process_and_a_dead_one_does_not_block(
    holder, tmp_path
):
    with (
        pytest.raises(InputError, match=f"run is being written to by process {holder.pid} on "),
        writing(tmp_path / "run"),
    ):
        pytest.fail("two writers")
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with writing(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("mine")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_a_block_inside_another_shares_its_lock(tmp_path):
    with writing(tmp_path / "run"):
        with writing(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run").exists(), "an empty folder that was made is left"


def test_a_folder_that_was_there_stays_and_what_a_kill_left_goes(tmp_path):
    left = [".run.json.17.part", "run.json.tmp", "checkpoint.pt.tmp", "model-0.tmp"]
    for name in left:
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.tmp").write_text("the user's own")
    assert all(is_ours(tmp_path / name) for name in [*left, LOCK])
    assert not is_ours(tmp_path / "notes.tmp")
    with writing(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(InputError, match="run is a file: give a folder"), writing(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "a file"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path, monkeypatch, number):
    def refuse(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(outputs.fcntl, "flock", refuse)
    with pytest.warns(DamageWarning, match="cannot be locked"), writing(tmp_path / "run"):
        Path(tmp_path / "run" / "file").write_text("written")
    assert (tmp_path / "run" / "file").exists()

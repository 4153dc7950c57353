"""The folder of a run: its settings, log, checkpoint, adapter and result.

run.json          settings, rows and number of steps; what `--resume` compares
ranks.json        ranks by layer, where they are chosen by the run itself
log.jsonl         one line a logged step or evaluation
checkpoint.pt     the last good state, replaced in one move
adapter/          the trained adapter
result.json       written last: the run is finished
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import InputError
from fastbound.files import replace_files
from fastbound.unlearning.data.encoding import Encoded

RUN = "run.json"
RANKS = "ranks.json"
RESULT = "result.json"
ADAPTER = "adapter"
_LOG = "log.jsonl"
_CHECKPOINT = "checkpoint.pt"


class RunFolder:
    """One run's files. Making one only checks that the folder is free; `begin` writes first.

    Args:
        path: folder of this run; made if missing.
        identity: what makes it this run and no other (settings, rows, steps), as JSON values.
        resume: go on with the run that the folder holds; a folder that holds none starts one.
        writes: whether this process writes; in a run of several only the first does.

    Raises:
        InputError: the folder holds a run and `resume` is False, or holds a different run, or
            holds files of another kind.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], *, resume: bool, writes: bool = True
    ) -> None:
        self.path = Path(path)
        self.writes = writes
        self.identity = identity
        check_free(self.path, RUN, resume=resume)
        if (self.path / RUN).exists():
            self._check_same()

    def begin(self) -> None:
        """Make the folder and mark it as this run's."""
        if self.writes and not (self.path / RUN).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN, self.identity)

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a file of JSON, once."""
        if self.writes and not (self.path / name).exists():
            write_json(self.path / name, value)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the log."""
        if self.writes:
            with (self.path / _LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one move: at every moment there is one whole file."""
        if self.writes:
            log = self.path / _LOG
            logged = log.stat().st_size if log.exists() else 0
            whole = {**state, "logged": logged}
            replace_files({self.path / _CHECKPOINT: lambda part: torch.save(whole, part)})

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None before the first; the log is cut back to where it was."""
        path = self.path / _CHECKPOINT
        state: dict[str, Any] | None = None
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # pickle, zip and torch each raise their own
                raise InputError(
                    f"{path} cannot be read ({type(error).__name__}: {error}): "
                    "give another output folder"
                ) from error
        if self.writes and (self.path / _LOG).exists():
            os.truncate(self.path / _LOG, 0 if state is None else state["logged"])
        return state

    def _check_same(self) -> None:
        held = _flat(read_json(self.path / RUN))
        for name, value in _flat(json.loads(json.dumps(self.identity))).items():
            other = held.get(name)
            if other != value:
                raise InputError(
                    f"{self.path} holds a run with {name} {other!r}, this one has {value!r}: "
                    "resume with the same settings and rows, or give another output folder"
                )


def check_free(path: Path, marker: str, *, resume: bool) -> None:
    """Raise `InputError` unless a run may be written to `path`.

    Args:
        marker: the file by which a run in progress or finished is known.
        resume: whether a folder with the marker is welcome.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file: give a folder")
    if (path / marker).exists():
        if not resume:
            raise InputError(
                f"output folder {path} holds another run: "
                "continue it with --resume (resume=True), or give another folder"
            )
    elif path.exists() and any(path.iterdir()):
        raise InputError(f"output folder {path} is not empty and holds no run: give another folder")


def fingerprint(rows: Sequence[Encoded]) -> str:
    """Hash of tokens and labels: the same for the same rows, template and tokenizer."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.labels]).encode())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; give another output folder") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: give another output folder")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    replace_files({path: text.encode()})


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, Mapping):
            flat.update(_flat(each, f"{prefix}{name}."))
        else:
            flat[prefix + name] = each
    return flat

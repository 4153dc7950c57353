"""The folder of a run: its settings, log, checkpoint, adapter and result.

run.json          settings, digests of model, tokenizer and rows, steps; what `--resume` compares
ranks.json        ranks by layer, if the run itself chose them
log.jsonl         one line per step or evaluation
checkpoint.pt     the last good state with a digest of itself, replaced in one move
adapter/          the trained adapter
result.json       written last: the run is finished
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastbound.errors import DamageWarning, InputError
from fastbound.files import append, is_ours, replace_files
from fastbound.unlearning.runs.identity import digest

RUN = "run.json"
RANKS = "ranks.json"
RESULT = "result.json"
ADAPTER = "adapter"
LOG = "log.jsonl"
_CHECKPOINT = "checkpoint.pt"
_MODEL = "the model or an adapter on it is another one; give the one that the run began with"
_ROWS = "give the rows that the run began with"
_REMEDIES = {
    "digests.weights": _MODEL,
    "digests.architecture": _MODEL,
    "digests.tokenizer": "give the tokenizer that the run began with",
    "rows.forget": _ROWS,
    "rows.retain": _ROWS,
    "tokens": _ROWS,
}


class RunFolder:
    """The files of one run. Making this object only checks that the folder is free; `begin` is the
    first to write.

    Args:
        path: folder of this run; made if missing.
        identity: what makes it this run and no other (settings, digests, steps), as JSON values.
        resume: continue the run that the folder holds; if it holds none, a new one starts.
        writes: whether this process writes; of several processes only the first does, within
            `fastbound.files.writing`.

    Raises:
        InputError: the folder holds a run and `resume` is False, or holds a different run, or
            holds files of another kind.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], *, resume: bool, writes: bool = True
    ) -> None:
        self.path = Path(path)
        self.writes = writes
        self.identity = json.loads(json.dumps(identity))
        self.digest = digest(self.identity)
        check_free(self.path, RUN, resume=resume)
        if (self.path / RUN).exists():
            self._check_same()

    def begin(self) -> None:
        """Make the folder and mark it as that of this run."""
        if self.writes and not (self.path / RUN).exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN, self.identity)

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file with its digest, unless it is there."""
        if self.writes and not (self.path / name).exists():
            plain = json.loads(json.dumps(value))
            write_json(self.path / name, {**plain, "digest": digest(plain)})

    def kept(self, name: str) -> dict[str, Any] | None:
        """What `keep` wrote, or None. Raises InputError if it is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        value = read_json(path)
        held = value.pop("digest", None)
        if held != digest(value):
            raise InputError(f"{path} is damaged: put a sound copy back, or start another run")
        return value

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to the log; the next checkpoint makes sure that it is on the disk."""
        if self.writes:
            append(self.path / LOG, f"{json.dumps(line)}\n".encode(), sync=False)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one move, after the log, so that there is always a whole one.

        Raises OSError, after which the last checkpoint is as it was.
        """
        if not self.writes:
            return
        append(self.path / LOG, b"")
        logged = (self.path / LOG).read_bytes()
        whole = {**state, "run": self.digest, "logged": len(logged), "log": _hash(logged)}
        whole["digest"] = digest(whole)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                torch.save(whole, file)

        replace_files({self.path / _CHECKPOINT: write})

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / _CHECKPOINT).exists()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, or None before the first. The log is cut back to its state then.

        Raises InputError if the checkpoint is damaged or belongs to another run.
        """
        path = self.path / _CHECKPOINT
        state = _read_checkpoint(path) if self.has_checkpoint else None
        if state is not None and state["run"] != self.digest:
            raise InputError(
                f"{path} is the checkpoint of another run: put this run's own back, or delete it "
                "and --resume starts from the first step"
            )
        if self.writes and (state is not None or (self.path / LOG).exists()):
            self._cut_log(*((0, _hash(b"")) if state is None else (state["logged"], state["log"])))
        return state

    def _cut_log(self, length: int, held: str) -> None:
        """Cut the log to what the checkpoint relies on; if that is damaged, to its sound lines."""
        path = self.path / LOG
        log = path.read_bytes() if path.exists() else b""
        kept = log[:length]
        if _hash(kept) != held:
            lines = kept[: kept.rfind(b"\n") + 1].splitlines(keepends=True)
            sound = next((n for n, line in enumerate(lines) if not _is_object(line)), len(lines))
            kept = b"".join(lines[:sound])
            warnings.warn(
                f"{path} is not the log that the checkpoint relies on: it is cut back to its first "
                f"{sound} lines, and the run goes on; the report lacks the others",
                DamageWarning,
                stacklevel=3,
            )
        if path.exists():
            os.truncate(path, len(kept))

    def _check_same(self) -> None:
        whole = read_json(self.path / RUN)
        held, ours = _flat(whole), _flat(self.identity)
        for name in dict.fromkeys((*ours, *held)):  # what only the held run has differs, too
            value, other = ours.get(name), held.get(name)
            if other != value:
                remedy = _REMEDIES.get(name, "resume with the same settings and rows")
                raise InputError(
                    f"{self.path} holds a run with {name} {other!r}, this one has {value!r}: "
                    f"{remedy}, or give another output folder"
                )
        if digest(whole) != self.digest:  # a sum of losses depends on their order
            raise InputError(
                f"{self.path} holds a run with the same settings in another order: give the losses "
                "in the order of its run.json, or give another output folder"
            )


def check_free(path: Path, marker: str, *, resume: bool | None) -> None:
    """Raise `InputError` unless a run may be written to `path`.

    Args:
        marker: the file that shows that the folder holds a run, finished or not.
        resume: whether a folder with the marker is accepted; None if no such run can be continued.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path} is a file: give a folder")
    if (path / marker).exists():
        if not resume:
            remedy = "" if resume is None else "continue it with --resume (resume=True), or "
            raise InputError(f"output folder {path} holds another run: {remedy}give another folder")
    elif path.exists() and not all(map(is_ours, path.iterdir())):
        raise InputError(f"output folder {path} is not empty and holds no run: give another folder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that a run has written. Raises InputError if it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}; give another output folder") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: give another output folder")
    return value


def finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # What cannot be encoded, such as the name of a file, becomes an escape of JSON.
    replace_files({path: text.encode(errors="backslashreplace")})


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        held = state.pop("digest")
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch each raise errors of their own
        held, state = error, None
    if not isinstance(held, str) or digest(state) != held:
        raise InputError(
            f"{path} is damaged: put a sound copy back, or delete it and --resume starts from the "
            "first step"
        ) from (held if isinstance(held, Exception) else None)
    return dict(state)


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, Mapping):
            flat.update(_flat(each, f"{prefix}{name}."))
        else:
            flat[prefix + name] = each
    return flat

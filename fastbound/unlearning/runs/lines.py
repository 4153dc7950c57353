"""Files with one line per finished part: each is on the disk once written, and carries a check."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbound.errors import DamageWarning
from fastbound.files import append, replace_files

_CHECK = re.compile(rb', "check": "([0-9a-f]{16})"\}\n')


class CheckedLines:
    """JSON objects of one run, one per line, each with a check of itself and of the run.

    Args:
        path: the file, which the first line makes.
        run: digest of the run they belong to; lines of another run count as damaged.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._run = run.encode()

    def read(self) -> list[dict[str, Any]]:
        """Every sound line. The others are removed from the file, with a `DamageWarning`.

        A last line that was cut off when the process was killed is removed without a warning.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        sound = [line for line in lines if self._is_sound(line)]
        if len(sound) < len(lines):
            damaged = [n for n, line in enumerate(lines, start=1) if not self._is_sound(line)]
            if damaged != [len(lines)] or lines[-1].endswith(b"\n"):
                warnings.warn(
                    f"{self.path}, line {', '.join(map(str, damaged))}: damaged or of another run; "
                    "what it held is computed again",
                    DamageWarning,
                    stacklevel=2,
                )
            replace_files({self.path: b"".join(sound)})
        values = [json.loads(line) for line in sound]
        for value in values:
            del value["check"]
        return values

    def add(self, value: Mapping[str, Any]) -> None:
        """Append one line and write it to the disk. Raises OSError."""
        text = json.dumps(value).encode()[:-1]
        append(self.path, text + b', "check": "%s"}\n' % self._check(text))

    def _is_sound(self, line: bytes) -> bool:
        found = _CHECK.search(line)
        return (
            found is not None
            and found.end() == len(line)
            and found[1] == self._check(line[: found.start()])
        )

    def _check(self, text: bytes) -> bytes:
        return hashlib.blake2b(self._run + text, digest_size=8).hexdigest().encode()

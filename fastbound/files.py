"""Files and folders that appear whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Content = bytes | Callable[[Path], Any]


def replace_files(files: Mapping[Path, Content]) -> None:
    """Write all files beside their places and onto the disk, then move each into its place.

    Args:
        files: by path, the bytes of a file or what writes it to the path it is given.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, content in files.items():
            if isinstance(content, bytes):
                parts[path].write_bytes(content)
            else:
                content(parts[path])
            with parts[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to fill, which becomes `folder` at the end of the block."""
    part = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    os.replace(part, folder)

"""Files and folders that appear whole or not at all, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Content = bytes | Callable[[Path], Any]
# Written beside a file until it is whole: `.name.PID.part`, and `name.tmp` of earlier releases.
_PART = re.compile(
    r"\..+\.\d+\.part|model(-\d+)?\.tmp"
    r"|(run|ranks|result|report|checkpoint|demo|lab|summary)\.(json|pt)\.tmp"
)
# Libraries in Rust and C++ name the system's error in their own exceptions alone.
_SYSTEM_ERROR = re.compile(r"os error (\d+)")


def replace_files(files: Mapping[Path, Content]) -> None:
    """Write all files beside their places and onto the disk, then move each into its place.

    Args:
        files: by path, the bytes of a file or what writes it to the path it is given.

    Raises:
        OSError: it names the file; those in place are as they were.
    """
    parts = {path: _part(path) for path in files}
    try:
        for path, content in files.items():
            with naming(path):
                if isinstance(content, bytes):
                    parts[path].write_bytes(content)
                else:
                    content(parts[path])
                _sync(parts[path])
        for path, part in parts.items():
            with naming(path):
                os.replace(part, path)
        for folder in {path.parent for path in files}:
            _sync_folder(folder)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place beside `folder` to fill, which becomes `folder` at the end of the block."""
    part = _part(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        with naming(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    _sync(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def append(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Add to the end of a file; with `sync` it is on the disk afterwards. Raises OSError."""
    with naming(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def is_part(path: Path) -> bool:
    """Whether a killed process left this on its way to a file: nothing that anyone reads."""
    return bool(_PART.fullmatch(path.name))


def remove_parts(folder: Path) -> None:
    """Take away what killed processes left in `folder` and in the folders in it."""
    for path in [*folder.glob("*"), *folder.glob("*/.*.part")]:
        if is_part(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system inside names `path`, and is an OSError whoever raised it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:  # safetensors' and torch's own
        found = _SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The names in it, too; some file systems do not offer it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

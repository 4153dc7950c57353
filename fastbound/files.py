"""Files and folders that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbound.errors import DamageWarning, InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Content = bytes | Callable[[Path], Any]
# A file is written under this name until it is whole: `.name.PID.part`, `name.tmp` in earlier
# releases.
_PART = re.compile(
    r"\..+\.\d+\.part|model(-\d+)?\.tmp"
    r"|(run|ranks|result|report|checkpoint|demo|lab|summary)\.(json|pt)\.tmp"
)
# Libraries in Rust and C++ report a system error only in the text of their own exceptions.
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_held: set[tuple[str, int, int]] = set()  # (lock file, process, thread)


def replace_files(files: Mapping[Path, Content]) -> None:
    """Write every file to disk under a temporary name, then move each into place.

    Args:
        files: for each path, the bytes to write or a function that writes the file to the path that
            it is given.

    Raises:
        OSError: names the file that could not be written. If writing fails, existing files are left
            as they were.
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
    """Yield a temporary path beside `folder`, which replaces `folder` at the end of the block."""
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
    """Append to a file; with `sync` the data is on disk on return. Raises OSError."""
    with naming(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def is_part(path: Path) -> bool:
    """Whether this is an unfinished file that a killed process left behind; nobody reads those."""
    return bool(_PART.fullmatch(path.name))


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left behind in `folder` and its direct subfolders."""
    for path in [*folder.glob("*"), *folder.glob("*/.*.part")]:
        if is_part(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any system error raised inside the block into an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    except Exception as error:  # safetensors and torch raise their own types
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
    """Flush the folder's entries to disk as well; some file systems do not support this."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(folder: Path, lock: str = LOCK) -> Iterator[None]:
    """Hold the lock of `folder` for the block: no other process writes there meanwhile.

    The folder is created if it does not exist, and removed again if it was created here and is
    still empty at the end. The system releases the lock when the process ends, however it ends. A
    nested block in the same thread shares the lock. If the file system does not support locks, a
    `DamageWarning` says so and the block runs without one.

    Args:
        lock: name of the lock file. Taking the default one also removes what killed processes left
            in the folder.

    Raises:
        InputError: another process is writing there, or `folder` is a file.
        OSError: the folder cannot be created or written to.
    """
    path = folder / lock
    key = (os.path.realpath(path), os.getpid(), threading.get_ident())
    if key in _held:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {folder} is a file: give a folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle, alone = _lock(path)
        _held.add(key)
        try:
            if alone and lock == LOCK:
                remove_parts(folder)
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # stops at the first one that is not empty
            for each in made:
                each.rmdir()


def is_ours(path: Path) -> bool:
    """Whether a file of an output folder is a lock or an unfinished file, which nobody reads."""
    return path.name == LOCK or is_part(path)


def _lock(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether it is locked.

    Another process may remove the file between our opening and locking it; then we try again.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            alone = _try_lock(handle, path)
            if alone and not _is_at(handle, path):
                os.close(handle)
                continue
            with contextlib.suppress(OSError):  # only used in a message; the disk may be full
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        return handle, alone


def _try_lock(handle: int, path: Path) -> bool:
    """Whether the lock was taken; False if the file system does not support locks."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        with naming(path):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise InputError(
            f"output folder {path.parent} is being written to by {holder}: wait until it ends, or "
            "give another folder"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}): make sure that no other process "
            "writes there",
            DamageWarning,
            stacklevel=5,
        )
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False

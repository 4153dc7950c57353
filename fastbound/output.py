"""An output folder belongs to one process at a time, and what killed ones left is taken away."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastbound.errors import DamageWarning, InputError
from fastbound.files import is_part, naming, remove_parts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_held: set[tuple[str, int, int]] = set()  # lock, process and thread


@contextlib.contextmanager
def writing(folder: Path, lock: str = LOCK) -> Iterator[None]:
    """Around all writing to `folder`: made if missing, and no other process writes there.

    The system drops the lock of a process that ends, however it ends. A block inside another one
    of the same thread shares its lock. A folder that was made here and is empty at the end is
    taken away again. Where the file system has no locks a `DamageWarning` says so.

    Args:
        lock: name of the file that is locked; the folder's own by default, which also takes away
            what killed processes left there.

    Raises:
        InputError: another process writes there, or a file lies in its place.
        OSError: the folder cannot be made or written to.
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
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for each in made:
                each.rmdir()


def is_ours(path: Path) -> bool:
    """Whether a file of an output folder is a lock or a leftover: nothing that anyone reads."""
    return path.name == LOCK or is_part(path)


def _lock(path: Path) -> tuple[int, bool]:
    """The open file and whether it is locked; it may go away between opening and locking it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            alone = _try_lock(handle, path)
            if alone and not _is_at(handle, path):
                os.close(handle)
                continue
            with contextlib.suppress(OSError):  # for the message alone; the disk may be full
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        return handle, alone


def _try_lock(handle: int, path: Path) -> bool:
    """False where the file system has no locks."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        with naming(path):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        raise InputError(
            f"output folder {path.parent} is being written to by {holder}: wait for its end, or "
            "give another folder"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warnings.warn(
            f"{path.parent} cannot be locked ({error.strerror}): see to it that no second process "
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

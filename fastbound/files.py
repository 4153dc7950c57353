"""Files and folders that appear whole or not at all, and belong to one process at a time."""

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
# Written beside a file until it is whole: `.name.PID.part`, and `name.tmp` of earlier releases.
_PART = re.compile(
    r"\..+\.\d+\.part|model(-\d+)?\.tmp"
    r"|(run|ranks|result|report|checkpoint|demo|lab|summary)\.(json|pt)\.tmp"
)
# Libraries in Rust and C++ name the system's error in their own exceptions alone.
_SYSTEM_ERROR = re.compile(r"os error (\d+)")
LOCK = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_held: set[tuple[str, int, int]] = set()  # lock, process and thread


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

"""One run at a time: locks that the system frees when their holder is gone, however that ends.

Not by the library filelock: whether it takes an error of a file system without locks for a lock that another run has,
and whether its file stays in the folder, differs from version to version, of which no package here asks for one.
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

FOLDER_LOCK = ".vispec.lock"

TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
"""What a system calls a lock that another process has; everything else means that there are no locks."""

CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""A place that cannot be written: nobody needs to be kept out of it."""


@contextmanager
def alone_in(folder: Path, flag: str) -> Iterator[None]:
    """Keep other runs from a folder, which is made, while this one writes there; `flag` is where the user gave it.

    Raises:
        ValueError: another run has it, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is no folder")
    with held(folder / FOLDER_LOCK, f"{flag} {folder} is in use by another run; wait for it or choose another folder"):
        yield


@contextmanager
def held(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `lock`, which is taken away again in the end. Where there are no locks, one notice says so.

    A process that is forked meanwhile holds it too, for as long as it lives.

    Raises:
        ValueError: with the text `refusal` where another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _acquire(lock, refusal)
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)


def _acquire(lock: Path, refusal: str) -> int | None:
    """The handle of the locked file; None where nothing can be locked."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in CLOSED:
                return None
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in TAKEN:
                raise ValueError(refusal) from None
            lock.unlink(missing_ok=True)
            _tell_once(f"notice: {lock.parent}: no locks there ({error}); let one run at a time use it")
            return None
        try:
            # who had it takes it away in the end, and a lock on what is gone keeps nobody out
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


@cache
def _tell_once(line: str) -> None:
    """However many files of a folder are locked."""
    print(line, file=sys.stderr)

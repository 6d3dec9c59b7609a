"""Files that appear whole or not at all."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_json_atomic(path: str | os.PathLike, value) -> None:
    """The file appears whole or not at all."""
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"))


def _special(path: Path) -> Path | int | None:
    """What to open where a path names something that is there to be written to: a device, a pipe, or an open file."""
    opened = Path(os.readlink(path)) if path.is_symlink() else path
    if opened.parent == Path("/proc/self/fd"):  # /dev/stdout, whatever it leads to
        return int(opened.name)
    return path if path.exists() and not (path.is_file() or path.is_dir()) else None


def write_atomic(path: str | os.PathLike, write: Callable) -> None:
    """Let `write(file)` fill a binary file beside `path`, then put it in place; devices and pipes are written to."""
    path = Path(path)
    special = _special(path)
    if special is not None:
        sys.stdout.flush()  # it may be where this goes
        with open(special, "wb", closefd=special == path) as file:
            write(file)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """What the system says of a full disk while `path` is written names it.

    An error of a write has no name, and torch.save hides it behind one of its own.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        found: BaseException | None = error
        while found and not isinstance(found, OSError):
            found = found.__cause__ or found.__context__
        if found is None or found.filename is not None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from None

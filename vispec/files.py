"""Files that appear whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_json_atomic(path: str | os.PathLike, value) -> None:
    """The file appears whole or not at all."""
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"))


def write_atomic(path: str | os.PathLike, write: Callable) -> None:
    """Let `write(file)` fill a binary file beside `path`, then put it in place."""
    path = Path(path)
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

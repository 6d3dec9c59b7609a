"""Files that appear whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
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
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

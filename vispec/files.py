"""Files that appear whole or not at all, and JSON files as they are read."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
"""Begins what git leaves in place of a large file that was not fetched."""
_KINDS = {dict: "an object", list: "a list"}


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


def read_json(path: str | os.PathLike, kind: type | None = dict):
    """What a JSON file holds.

    Args:
        kind: dict or list, what that must be; None for anything.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or holds something else; the message names the file.
    """
    value = parse_json(Path(path).read_bytes(), str(path))
    if kind is not None and not isinstance(value, kind):
        found, wanted = _KINDS.get(type(value), "a single value"), _KINDS[kind]
        raise ValueError(f"{path}: expected {wanted}, found {found}")
    return value


def parse_json(content: bytes, name: str):
    """The JSON in the bytes of a file, or of a line of it, which `name` says; raises ValueError with that name."""
    if not content.strip():
        raise ValueError(f"{name}: empty, expected JSON")
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{name}: a git-lfs pointer, not the file itself: run `git lfs pull` there")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"{name}: not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None

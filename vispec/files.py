"""Files that appear whole or not at all, and JSON files as they are read."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"
"""Ends the name of what is being written, which begins with a dot and the name that it gets."""
LFS_POINTER = b"version https://git-lfs"
"""Begins what git leaves in place of a large file that was not fetched."""
_KINDS = {dict: "an object", list: "a list"}


def write_json_atomic(path: str | os.PathLike, value) -> None:
    """The file appears whole or not at all."""
    write_bytes_atomic(path, json_bytes(value, indent=1) + b"\n")


def write_bytes_atomic(path: str | os.PathLike, content: bytes) -> None:
    """The file appears whole or not at all; one that holds the same may lie where nothing can be written."""
    if not (Path(path).is_file() and Path(path).read_bytes() == content):
        write_atomic(path, lambda file: file.write(content))


def json_bytes(value, **options) -> bytes:
    """A value as JSON; half of a surrogate pair, which UTF-8 has not, is spelt as JSON spells it."""
    return json.dumps(value, ensure_ascii=False, **options).encode(errors="backslashreplace")


def _special(path: Path) -> Path | int | None:
    """What to open where a path names something that is there to be written to: a device, a pipe, or an open file."""
    opened = Path(os.readlink(path)) if path.is_symlink() else path
    if opened.parent == Path("/proc/self/fd"):  # /dev/stdout, whatever it leads to
        return int(opened.name)
    return path if path.exists() and not (path.is_file() or path.is_dir()) else None


def write_atomic(path: str | os.PathLike, write: Callable) -> None:
    """Let `write(file)` fill a binary file beside `path`, then put it in place.

    Devices and pipes are written to; a link stays, and what it leads to is replaced.
    """
    path = Path(path)
    special = _special(path)
    if special is not None:
        sys.stdout.flush()  # it may be where this goes
        with open(special, "wb", closefd=special == path) as file:
            write(file)
        return
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=UNFINISHED)
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, names: str) -> None:
    """Remove what `write_atomic` has left in a folder where it was killed.

    Args:
        names: regular expression of the files that were being written; nothing else is touched.
    """
    left = re.compile(rf"\.({names})\.[a-z0-9_]{{8}}{re.escape(UNFINISHED)}")
    for path in folder.iterdir() if folder.is_dir() else ():
        if left.fullmatch(path.name):
            path.unlink(missing_ok=True)


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
        if found is None or found.errno is None or found.filename is not None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from None


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

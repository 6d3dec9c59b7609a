"""What was found out once and is kept in the user's cache folder, as JSON objects, for all processes."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from vispec.files import read_json, write_json_atomic


def recall(name: str) -> dict:
    """What a file of the cache folder holds; nothing where there is no such file, or none that can be read."""
    try:
        return read_json(_place(name))
    except (OSError, ValueError, RuntimeError):
        return {}


def remember(name: str, found: Mapping) -> None:
    """Add to what a file of the cache folder holds; where it cannot be written, it is found out again next time."""
    with contextlib.suppress(OSError, RuntimeError):
        write_json_atomic(_place(name), recall(name) | found)  # another process may have written meanwhile


def _place(name: str) -> Path:
    """Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vispec", name)

"""Processes that end with the one that started them, however that one ends.

A child's standard input is a pipe whose other end the parent holds and never writes to. When the parent is gone, by an
error, by a signal or by kill -9, the system closes the pipe, and a thread of the child sees its end.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

WATCH = "VISPEC_ENDS_WITH_PARENT"
"""Set in the environment of a child whose command goes through `vispec.cli.run_cli`."""

ABANDONED = 143
"""Exit code of a child whose parent is gone: that of a process ended by SIGTERM."""


def start_child(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
    """Start one of our command lines; its output is added to the file `log`.

    Args:
        command: after `python -m`.
        environment: what is changed in ours.
    """
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **(environment or {}), WATCH: "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def end_with_parent() -> None:
    """In a child: leave as soon as the parent is gone. Files appear whole or not at all, so any moment will do."""
    if os.environ.pop(WATCH, None):
        threading.Thread(target=_wait_for_end, name="parent watch", daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)  # nothing is ever written: this returns at the pipe's end
    os._exit(ABANDONED)

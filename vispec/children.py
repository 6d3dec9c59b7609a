"""Processes that end with the one that started them, however that one ends.

The standard input of a child of ours is a pipe whose other end the parent holds and never writes to. When the parent is
gone, by an error, by a signal or by kill -9, the system closes the pipe, and a thread of the child sees its end. What
accelerate or torchrun have launched has no such pipe: a thread asks now and then who its parent is.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

WATCH = "VISPEC_ENDS_WITH_PARENT"
"""Set in the environment of a child whose command goes through `vispec.cli.run_cli`."""

ABANDONED = 143
"""Exit code of a child whose parent is gone: that of a process ended by SIGTERM."""

LOOK_SECONDS = 0.5


def start_child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start one of our command lines; its output is added to the file `log`.

    Args:
        command: after `python -m`.
        environment: what is changed in ours.
    """
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **environment, WATCH: "1"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def end_with_parent() -> None:
    """In a child: leave as soon as the parent is gone. Files appear whole or not at all, so any moment will do."""
    if os.environ.pop(WATCH, None):
        _watch(_wait_for_end)
    elif launcher():
        parent = os.getppid()
        _watch(lambda: _wait_for_other_parent(parent))


def _watch(wait: Callable[[], object]) -> None:
    def leave() -> None:
        wait()
        os._exit(ABANDONED)

    threading.Thread(target=leave, name="parent watch", daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)  # nothing is ever written: this returns at the pipe's end


def _wait_for_other_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)


def launcher() -> list[str]:
    """The command line of the accelerate or torchrun that started us, [] where none did.

    A shell is none, whatever it has exported: what it starts may outlive it.
    """
    if not os.environ.keys() & {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"}:
        return []
    import psutil  # of accelerate

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []
    return words if "TORCHELASTIC_RUN_ID" in os.environ or any("accelerate" in word for word in words) else []

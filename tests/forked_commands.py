"""Commands in processes of their own, forked from one that has their libraries: each saves the seconds of its imports.

All that `python -m` does from there on is done. That commands import what they need is for others to test.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vispec.ge_data.maker", "vispec.train.command"])


def start(
    command: list[str], log: Path, processes: int = 1, folder: Path = ROOT, before: Callable[[], None] | None = None
) -> list[BaseProcess]:
    """Start a command line, as `processes` that work together if there are several.

    Args:
        command: after `python -m`.
        log: a file to which all output is added.
        folder: the working directory.
        before: a module's function, called first.
    """
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        # what torchrun would say to each
        with socket.create_server(("127.0.0.1", 0)) as free:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [_context.Process(target=_run, args=(command, log, folder, one, before)) for one in environments]
    for process in started:
        process.start()
    return started


def finish(command: list[str], log: Path, processes: int = 1, code: int = 0, **options) -> str:
    """Run to the end, and to this exit code; returns what was printed."""
    started = start(command, log, processes, **options)
    for process in started:
        process.join(1200)
    text = log.read_text()
    assert [process.exitcode for process in started] == [code] * processes, text
    return text


def kill(started: list[BaseProcess]) -> None:
    """kill -9 for all of them."""
    for process in started:
        process.kill()
    for process in started:
        process.join()


def slow_disk() -> None:
    """What is written takes half a second to be safe."""
    flush = os.fsync

    def fsync(file) -> None:
        time.sleep(0.5)
        flush(file)

    os.fsync = fsync


def _run(
    command: list[str], log: Path, folder: Path, environment: Mapping[str, str], before: Callable[[], None] | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= environment
    os.chdir(folder)
    if before is not None:
        before()
    sys.argv = list(command)
    sys.modules.pop(command[0], None)  # that another module has imported it is no news
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)

"""Children end with the process that started them, also when it has no time to end them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
PARENT = """
import sys
from pathlib import Path
from vispec.ge_data.workers import run_workers
run_workers("fake_worker", sys.argv[1:], ["0", "1"], Path(sys.argv[1], "logs"))
"""
WORKER = """
import os, sys, time
from pathlib import Path
from vispec.cli import run_cli
def main():
    Path(sys.argv[1], f"{os.getpid()}.pid").touch()
    time.sleep(300)
run_cli(main)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command_that_started_them(tmp_path, number):
    (tmp_path / "fake_worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert not any(gone(pid) for pid in workers)
    parent.send_signal(number)
    assert parent.wait() == -number
    wait_for(lambda: all(gone(pid) for pid in workers))

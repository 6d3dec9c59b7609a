"""Training commands as users start them: in processes of their own, alone or by `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "ACCELERATE_USE_CPU": "true",  # with --cpu, accelerate launch starts one process whatever it is asked for
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
}


def command(processes: int, *arguments: str) -> list[str]:
    """`arguments` are those of python, or with several processes those of accelerate launch."""
    if processes == 1:
        return [sys.executable, *arguments]
    several = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    several += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *several, *arguments]


def start(arguments: list[str], log: Path) -> psutil.Popen:
    with open(log, "wb") as file:
        environment = {**os.environ, **ENVIRONMENT}
        return psutil.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def finish(arguments: list[str], log: Path) -> str:
    """Run to the end; returns what was printed."""
    code = start(arguments, log).wait(timeout=1200)
    text = log.read_text()
    assert code == 0, text
    return text


def kill(process: psutil.Popen) -> None:
    """kill -9 for a launcher and for all that it has launched, which are sessions of their own."""
    everyone = [process, *process.children(recursive=True)]
    for one in everyone:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(everyone, timeout=60)

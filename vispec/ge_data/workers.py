"""One process for each group of GPUs."""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vispec.children import start_child

POLL_SECONDS = 0.1


def gpu_groups(gpus: Sequence[str], gpus_per_model: float) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker; below 1, `gpus_per_model` puts several workers on one GPU.

    >>> gpu_groups(["0", "1", "2", "3"], 2)
    ['0,1', '2,3']
    >>> gpu_groups(["0", "1"], 0.5)
    ['0', '0', '1', '1']
    """
    if not 0 < gpus_per_model < math.inf:
        raise ValueError(f"--gpus_per_model {gpus_per_model}: expected a number above 0")
    if gpus_per_model < 1:
        workers = round(1 / gpus_per_model)
        return [gpu for gpu in gpus for _ in range(workers)]
    size = int(gpus_per_model)
    if size != gpus_per_model:
        raise ValueError(f"--gpus_per_model {gpus_per_model}: expected a whole number or one below 1")
    if gpus and len(gpus) < size:
        raise ValueError(f"--gpus_per_model {size}: only {len(gpus)} GPU(s) are visible")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]


def visible_gpus() -> list[str]:
    """Names of the visible GPUs, as CUDA_VISIBLE_DEVICES wants them."""
    import torch

    if not torch.cuda.is_available():
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]


def run_workers(module: str, argv: Sequence[str], groups: Sequence[str], logs: Path) -> int:
    """Run `python -m module argv --worker i/n` once for each GPU group; all of them finish, or end with this process.

    Returns:
        0, or the exit code of the first worker that failed; the end of its log goes to stderr as soon as it has.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running = {}
    for i, group in enumerate(groups):
        log = logs / f"worker_{i}.log"
        log.unlink(missing_ok=True)
        command = [module, *argv, "--worker", f"{i}/{len(groups)}"]
        running[i] = (log, start_child(command, log, {"CUDA_VISIBLE_DEVICES": group}))
        print(f"worker {i}/{len(groups)} on GPU {group}: progress in {log}", flush=True)
    failed = 0
    try:
        while running:
            for i, (log, process) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[i]
                if code:
                    code = code if code > 0 else 128 - code
                    failed = failed or code
                    end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    report = f"worker {i} ended with exit code {code}; the end of {log}:\n{end}"
                    print(report, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for _, process in running.values():
            process.terminate()
    return failed

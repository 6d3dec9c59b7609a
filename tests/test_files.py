"""What is said when a disk is full, and when a command is interrupted before it has begun."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from launching import ROOT
from test_train_steps import make_trainer, write_data

from vispec.ge_data.sample_file import read_sample, write_sample


@contextmanager
def full_disk():
    """No file of this process grows beyond some kilobytes: the system says so as it does of a full disk.

    Pytest's own output may be such a file, so this must end within the test.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_is_named(tmp_path):
    data = write_data(tmp_path / "data")
    sample, trainer = read_sample(data / "00000001.safetensors"), make_trainer(data, tmp_path / "cp")
    sample.hidden = torch.zeros(5000, 16)
    with full_disk():
        with pytest.raises(OSError, match=r"cp/resume\.pt"):
            trainer.save()
        with pytest.raises(OSError, match=r"out/00000000\.safetensors"):
            write_sample(tmp_path / "out" / "00000000.safetensors", sample)
    assert not list((tmp_path / "cp").iterdir()) and not list((tmp_path / "out").iterdir())


def test_ctrl_c_while_a_command_imports(tmp_path):
    """One line, also where what is being imported would swallow it."""
    (tmp_path / "tqdm.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path(__file__).with_name('begun').touch()\n"
        "try:\n    time.sleep(300)\nexcept BaseException:\n    tqdm = None\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "vispec.train.draft_vocab", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"interrupted; what was written is whole\n")

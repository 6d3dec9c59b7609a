"""One run at a time writes into a folder, and what launchers have started ends with them."""

import errno
import fcntl
import os
import subprocess
import sys

import psutil
import pytest
from launching import ROOT, command, kill, start
from test_children import gone, wait_for
from test_train_steps import EIGHT_SHAPES, write_data
from tiny_rows import CONFIGS, TARGETS, contents, generate, write_rows

from vispec.files import UNFINISHED
from vispec.locks import FOLDER_LOCK, alone_in
from vispec.train import main
from vispec.train.states import RESUME_FILE

HOLDER = "import sys, time; from pathlib import Path; from vispec.locks import alone_in\n"
HOLDER += "with alone_in(Path(sys.argv[1]), '--out'): print(flush=True); time.sleep(300)"


def training(tmp_path) -> list[str]:
    write_data(tmp_path / "data", EIGHT_SHAPES, size=64, vocabulary=37)
    arguments = ["--basepath", TARGETS["llava"], "--configpath", CONFIGS["llava"], "--cpdir", str(tmp_path / "cp")]
    return [*arguments, "--tmpdir", str(tmp_path / "data")]


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path):
    folder = tmp_path / "new"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, env=environment)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=r"--out \S*new is in use by another run"), alone_in(folder, "--out"):
        pytest.fail("two runs have the folder")
    holder.kill()
    holder.wait()
    assert (folder / FOLDER_LOCK).is_file()
    with alone_in(folder, "--out"):
        pass
    assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with alone_in(tmp_path, "--out"):
            assert not list(tmp_path.iterdir())
    told = capsys.readouterr().err
    assert told.startswith(f"notice: {tmp_path}: no locks there") and told.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_open_to_all(tmp_path, monkeypatch, capsys):
    def closed(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", closed)
    with alone_in(tmp_path, "--out"):
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_commands_leave_a_folder_alone_that_another_run_fills(tmp_path):
    arguments, rows = training(tmp_path), write_rows(tmp_path / "rows")
    for folder in (tmp_path / "cp", tmp_path / "out"):
        folder.mkdir()
        (folder / f".{RESUME_FILE}.being_wr{UNFINISHED}").touch()
        (folder / f".manifest.json.being_wr{UNFINISHED}").touch()
    before = contents(tmp_path)
    with alone_in(tmp_path / "cp", "--cpdir"), alone_in(tmp_path / "out", "--outdir"):
        with pytest.raises(ValueError, match=r"--cpdir \S*cp is in use by another run"):
            main.main(arguments)
        with pytest.raises(ValueError, match=r"--outdir \S*out is in use by another run"):
            generate("text", "llava", rows, tmp_path / "out")
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match=r"--outdir \S*text.json is no folder"):
        generate("text", "llava", rows, rows / "text.json")
    assert generate("text", "llava", rows, tmp_path / "out") == 0


def test_launched_trainings_end_with_their_launcher(tmp_path):
    arguments = [*training(tmp_path), "--num-epochs", "100000", "--save-every", "100000"]
    launcher = start(command(2, "-m", "vispec.train.main", *arguments), tmp_path / "log")
    metrics = tmp_path / "cp" / "metrics.jsonl"
    workers = []
    try:
        wait_for(lambda: launcher.poll() is not None or metrics.is_file() and metrics.stat().st_size)
        workers = launcher.children(recursive=True)
        assert len(workers) == 2, (tmp_path / "log").read_text()
        psutil.Process(launcher.pid).kill()
        wait_for(lambda: all(gone(worker.pid) for worker in workers))
    finally:
        for process in [*workers, launcher]:
            if process.is_running():
                kill(process)

"""Files that appear whole or not at all, and what is no file."""

import json
import os
import subprocess
import sys
import threading

import pytest

from vispec.files import write_atomic, write_json_atomic


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json_atomic(path, [1])

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == [1] and list(path.parent.iterdir()) == [path]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json_atomic(pipe, {"a": 1})
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_written_to_and_stays(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    write_json_atomic(tmp_path / "null", {"a": 1})
    assert (tmp_path / "null").is_char_device()


@pytest.mark.parametrize("target", ["file", "pipe"])
def test_standard_output_is_written_to_in_order(tmp_path, target):
    """Its name is a link, which may lead to a file."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = f"""\
from vispec.files import write_json_atomic
print("first")
write_json_atomic("{tmp_path}/stdout", 2)
print("third")
"""
    with (tmp_path / "out").open("wb") as file:
        out = file if target == "file" else subprocess.PIPE
        printed = subprocess.run([sys.executable, "-c", code], stdout=out, check=True).stdout
    assert (printed or (tmp_path / "out").read_bytes()) == b"first\n2\nthird\n"
    assert (tmp_path / "stdout").is_symlink()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError):
        write_json_atomic(tmp_path, {})
    assert list(tmp_path.iterdir()) == []

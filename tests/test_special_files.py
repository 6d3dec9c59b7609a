"""Files that appear whole or not at all, and what is no file."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading

import pytest

from vispec.files import UNFINISHED, remove_unfinished, write_atomic, write_json_atomic


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json_atomic(path, [1])

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == [1] and list(path.parent.iterdir()) == [path]


def test_what_is_there_already_is_not_written(tmp_path, monkeypatch):
    write_json_atomic(tmp_path / "a.json", {"a": 1})

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    write_json_atomic(tmp_path / "a.json", {"a": 1})
    with pytest.raises(OSError, match="Read-only"):
        write_json_atomic(tmp_path / "a.json", {"a": 2})


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


def test_a_link_stays_and_leads_to_what_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (link := tmp_path / "a.json").symlink_to(tmp_path / "disk" / "a.json")
    for value in (1, 2):
        write_json_atomic(link, value)
        assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["a.json"]
        assert json.loads(link.read_text()) == value


def test_only_what_was_being_written_is_removed(tmp_path):
    halves = []
    write_atomic(tmp_path / "1.pt", lambda file: halves.extend(tmp_path.iterdir()))
    halves[0].touch()
    others = {".1.pt.bak", ".1.pt.original", f".11.pt.a_word_8{UNFINISHED}", f"1.pt.a_word_8{UNFINISHED}", "1.pt"}
    for name in others:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, r"\d\.pt")
    assert {path.name for path in tmp_path.iterdir()} == others
    remove_unfinished(tmp_path / "nowhere", ".*")


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

"""The GPU check of training, tried on the CPU at tiny sizes: data, both stages, kill -9 and the table."""

import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from script_files import script

from vispec.train.processes import Processes

FLAGS = ["--size", "tiny", "--device", "cpu", "--samples", "4", "--new-tokens", "6", "--text-tokens", "110"]


@pytest.fixture
def check():
    return script("gpu_train_check")


def test_all_parts_at_tiny_sizes(check, tmp_path, monkeypatch, capsys):
    """All but the one that is killed run here; that one is a process in bfloat16 as well."""
    bf16 = Processes(torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    monkeypatch.setattr("vispec.train.command.launched_processes", lambda: bf16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    def here(command: list[str], log: Path, limit: float) -> None:
        with log.open("w") as file, redirect_stdout(file):
            assert check.main(command[1:]) == 0

    monkeypatch.setattr(check, "in_a_process", here)
    out = tmp_path / "out"
    assert check.main([*FLAGS, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "answers to prompts of 64 tokens" in printed and "they predict 100.0% of the answers' tokens" in printed
    rows = re.findall(r"^\| (stage [^|]*) \| ([\d.]+) \| - \| [\d.]+ GiB \| ([\d.]+) \|$", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["stage 1", "stage 2", "stage 2, resumed"]
    assert rows[1][2] == rows[2][2], "the loss of an unbroken run"
    assert "the last weights differ by up to 0 from those of stage 2" in printed
    with pytest.raises(ValueError, match=r"--out \S*out: there already"):
        check.main([*FLAGS, "--out", str(out)])


def test_what_fails_is_named_under_the_table(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "in_a_process", lambda *_: "not finished within 9 s")
    monkeypatch.setattr(check, "commands", lambda *_: {"data": ["-c", ""], check.KILLED: ["-c", ""]})
    assert check.main(["--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "- data: not finished within 9 s"
    assert printed[-1] == "- stage 2, killed: it should have been killed with a state, exit code 0"
    assert any(line.startswith("| training |") for line in printed)

"""rebuild.sh with a stand-in for Python: what it goes on after, and what it takes for whole."""

import os
import subprocess
from pathlib import Path

import pytest

from vispec import demo

SCRIPT = Path(demo.__file__).with_name("rebuild.sh")
STAND_IN = """#!/bin/sh
echo "$*" >> calls
case "$2" in
    vispec.demo.check_target) exit "${CHECK:-0}" ;;
    vispec.demo.make_data) mkdir -p "$4/ShareGPT_V3"; [ -z "${CUT:-}" ] || exit 1; touch "$4/whole" ;;
esac
"""


@pytest.fixture
def rebuild(tmp_path):
    """Runs the script in an empty folder; returns its exit code and the modules that it has called."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "out" / "rebuild" / "target" / "model").mkdir(parents=True)
    state = tmp_path / "out" / "rebuild" / "stage2" / "state_8"
    state.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (state / name).touch()

    def run(**variables):
        (tmp_path / "calls").write_text("")
        environment = {**os.environ, "PYTHON": "./python", **variables}
        done = subprocess.run(["sh", str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, [call.split()[1].removeprefix("vispec.") for call in calls]

    return run


def test_a_missed_threshold_ends_nothing_and_an_error_all(rebuild, tmp_path):
    for code in (1, 2, 137):
        assert rebuild(CHECK=str(code)) == (code, ["demo.build_target", "demo.check_target"])
    for code in (3, 0):
        ended, calls = rebuild(CHECK=str(code))
        assert ended == 0 and "ge_data.allocation_llava_shargpt" in calls
    weights = tmp_path / "vispec" / "demo" / "weights"
    assert (weights / "target").is_dir() and (weights / "draft" / "model.safetensors").is_file()


def test_half_made_data_are_made_again(rebuild, tmp_path):
    ended, calls = rebuild(CUT="1")
    assert ended == 1 and calls[-1] == "demo.make_data"
    assert not (tmp_path / "out" / "rebuild" / "data").exists()
    ended, calls = rebuild()
    assert ended == 0 and "demo.make_data" in calls
    assert [path.name for path in (tmp_path / "out" / "rebuild").glob("data*")] == ["data"]
    assert (tmp_path / "out" / "rebuild" / "data" / "whole").is_file()
    assert "demo.make_data" not in rebuild()[1]

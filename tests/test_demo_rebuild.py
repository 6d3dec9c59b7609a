"""rebuild.sh and compare.sh with a stand-in for Python: what they go on after, and what they take for whole."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from vispec import demo
from vispec.evaluation import run_all
from vispec.methods import HEADS, MODELS, method_of

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
    for size in ("target", "small"):
        (tmp_path / "out" / "rebuild" / size / "model").mkdir(parents=True)
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
    assert all((weights / name).exists() for name in ("target", "small", "draft/model.safetensors"))


def test_half_made_data_are_made_again(rebuild, tmp_path):
    ended, calls = rebuild(CUT="1")
    assert ended == 1 and calls[-1] == "demo.make_data"
    assert not (tmp_path / "out" / "rebuild" / "data").exists()
    ended, calls = rebuild()
    assert ended == 0 and "demo.make_data" in calls
    assert [path.name for path in (tmp_path / "out" / "rebuild").glob("data*")] == ["data"]
    assert (tmp_path / "out" / "rebuild" / "data" / "whole").is_file()
    assert "demo.make_data" not in rebuild()[1]


def test_every_head_that_is_compared_was_trained(tmp_path):
    """compare.sh measures the last state of each training, by the flags of run_all."""
    made = '[ "$2" != vispec.demo.make_benchmarks ] || mkdir -p "$4"'
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$*" >> calls\n{made}\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["sh", str(SCRIPT.with_name("compare.sh"))], cwd=tmp_path, env={**os.environ, "PYTHON": "./python"}, timeout=60
    )
    assert done.returncode == 0
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    trained = set()
    for call in calls:
        if "accelerate.commands.launch" in call:
            value = dict(zip(call, call[1:], strict=False))
            assert value.get("--loadpath", "out/rebuild/stage1/state_6") in {"out/rebuild/stage1/state_6", *trained}
            assert value["--save-every"] == value["--num-epochs"]
            trained.add(f"{value['--cpdir']}/state_{value['--num-epochs']}")
    (measured,) = [call[2:] for call in calls if call[1] == "vispec.evaluation.run_all"]
    args = run_all._make_parser().parse_args(measured)
    heads = dict(args.spec_model_path)
    assert heads.pop("vlm") == "out/rebuild/small/model" and set(heads.values()) <= trained
    assert {method_of(name) for name in heads} == HEADS.keys() and set(args.methods) >= {*MODELS, "lookup", "generate"}

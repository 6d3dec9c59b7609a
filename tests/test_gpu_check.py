"""The GPU check, tried on the CPU: outputs are compared, parts end in time, the table says what is missing."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "scripts" / "gpu_check.py"
RUN = "Qwen2.5-VL-7B-Instruct/bfloat16/32768"


@pytest.fixture
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bench_result(identical: bool, dtype: str) -> dict:
    """What the table reads of a bench's JSON: a step at 90 % of its floor, a round at 1.5 times its floor."""
    tree = {
        "round": {"seconds": 0.015, "floor": 0.01, "times_floor": 1.5},
        "round_in_plain_steps": 1.35,
        "device_busy_seconds": 0.012,
        "projected": [
            {"tau": 2.0, "speedup": 2.22},
            {"tau": 2.24, "speedup": 2.4, "published_speedup": 1.8},
        ],
    }
    same = {"compared": 16, "identical": identical, "first_difference": None if identical else 7}
    return {
        "device": {"name": "some GPU", "dtype": dtype, "versions": {"torch": "2.11", "transformers": "5.17"}},
        "rates": {"bandwidth": 2e12, "matmul": 6e14},
        "context": 512,
        "plain_step": {"seconds": 0.0111, "floor": 0.01, "times_floor": 1 / 0.9},
        "transformers_step": {"our_tokens_per_second_over_theirs": 1.1},
        "outputs": {"30/3/8": same},
        "trees": {"30/3/8": tree},
    }


def test_outputs_of_tiny_models(check, monkeypatch):
    monkeypatch.setattr(check, "FAMILIES", ("qwen2_5_vl",))
    monkeypatch.setattr(check, "SEEDS", (0,))
    monkeypatch.setattr(check, "NEW_TOKENS", 8)
    exact = check.exactness("cpu")
    assert exact.keys() == {"float32", "bfloat16"}
    assert exact["float32"]["answers"] == 3 and exact["float32"]["accepted"] > 0
    assert check.differing({"exactness": exact}) == []
    exact["float32"]["spec_differs_from_baseline"] = 2
    assert check.differing({"exactness": exact}) == ["tiny models: spec_differs_from_baseline in 2 answers"]


def test_the_table(check):
    lines = check.report({RUN: bench_result(True, "bfloat16")}, {"exactness": "not finished within 9 s"})
    (row,) = [line for line in lines if line.startswith(f"| {RUN}")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        *("11.10", "90%", "1.10", "30/3/8", "15.00", "1.50 !", "1.35", "20%"),
        *("2.40 at 2.24 (published 1.80)", "equal"),
    ]
    assert "- exactness: not finished within 9 s" in lines


def test_only_float32_has_to_be_equal(check):
    assert check.differing({RUN: bench_result(False, "bfloat16")}) == []
    assert check.differing({RUN: bench_result(False, "float32")}) == [f"{RUN}: 30/3/8 differs"]


def test_the_bench_gets_the_run(check, tmp_path):
    args = check.parse(["--device", "cpu", "--repeats", "2"])
    command = check.bench_command(RUN, args, tmp_path)
    from vispec.evaluation import bench

    flags = bench.parse(command[2:])
    assert (flags.random_weights, flags.dtype, flags.draft_vocab) == ("Qwen2.5-VL-7B-Instruct", "bfloat16", 32768)
    assert (flags.device_map, flags.repeats, flags.trees) == ("cpu", 2, [(30, 3, 8)])


def test_the_table_comes_whatever_happens(check, monkeypatch, tmp_path, capsys):
    done = tmp_path / "done.json"
    done.write_text(json.dumps(bench_result(True, "float32")))

    def command(run, args, out):
        write = f"import shutil; shutil.copy({str(done)!r}, {str(out / 'good-float32.json')!r})"
        return ["-c", write if run == "good/float32" else "raise SystemExit('no')"]

    monkeypatch.setattr(check, "bench_command", command)
    monkeypatch.setattr(check, "__file__", "no such script")
    flags = ["--runs", "good/float32", "bad/float32", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert check.main(flags) == 1
    printed = capsys.readouterr().out
    assert "| good/float32 |" in printed
    assert "- bad/float32: exit code 1: no" in printed
    assert "- exactness: exit code 2" in printed


def test_a_part_ends_in_time(check, tmp_path):
    reason = check.in_a_process(["-c", "import time; time.sleep(60)"], tmp_path / "log", limit=0.01)
    assert reason == "not finished within 0 s"

"""The GPU check, tried on the CPU: outputs are compared, parts end in time, the table says what is missing."""

import json

import pytest
import torch
from script_files import script

from vispec.model.sampling import Choice, Sampling, draw
from vispec.model.shape import TreeShape

RUN = "Qwen2.5-VL-7B-Instruct/bfloat16/32768"


@pytest.fixture
def check():
    return script("gpu_check")


@pytest.fixture
def exactness():
    return script("gpu_exactness")


def bench_result(identical: bool, dtype: str) -> dict:
    """What the table reads of a bench's JSON: a step at 90 % of its floor, a round at 1.5 times its floor."""
    tree = {
        "round": {"seconds": 0.015, "floor": 0.01, "times_floor": 1.5},
        "round_in_plain_steps": 1.35,
        "device_busy_seconds": 0.012,
        "everything_else_share": 0.2,
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
        "captured": "all",
        "trees": {"30/3/8": tree},
    }


def test_outputs_of_tiny_models(check, exactness, monkeypatch, tmp_path):
    """Every check of the outputs passes on a CPU; one that breaks is written down."""
    for name, value in {"FAMILIES": ("qwen2_5_vl",), "SEEDS": (0,), "NEW_TOKENS": 8, "TREE": (12, 3, 4)}.items():
        monkeypatch.setattr(exactness, name, value)
    monkeypatch.setattr(exactness, "SAMPLED_TOKENS", 120)
    monkeypatch.setattr(exactness, "LONG_ANSWER", 60)
    monkeypatch.setitem(exactness.CHECKS, "broken", lambda device: 1 / 0)
    file = tmp_path / "exactness.json"
    assert exactness.main(["--device", "cpu", "--json", str(file)]) == 0
    found = {"exactness": json.loads(file.read_text())}
    answers = {name: counts.get("answers") for name, counts in found["exactness"].items()}
    assert answers == {
        "float32": 3, "bfloat16": 3, "batch": 3, "sampling": 4, "growth": 1, "lookup": 1, "auto": 1, "broken": None
    }  # fmt: skip
    assert check.differing(found) == ["tiny models, broken: ZeroDivisionError: division by zero"]
    assert len(check.not_captured(found)) == len(answers) - 1
    found["exactness"]["growth"]["spec_differs"] = 2
    found["exactness"]["sampling"]["least_p_value"] = 1e-9
    del found["exactness"]["broken"]
    assert check.differing(found) == [
        "tiny models, sampling: tokens are not distributed as the target's",
        "tiny models, growth: spec_differs in 2 answers",
    ]


def test_ranks_that_the_target_would_not_give_are_noticed(exactness):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(600, 12, generator=generator)
    settings = {"temperature": 0.8, "top_p": 0.9, "top_k": 5}

    def drawn(**settings) -> torch.Tensor:
        scores = Choice(Sampling(**settings).warpers).scores(logits)
        return draw(scores, torch.empty_like(scores).exponential_(generator=generator))

    right = drawn(**settings)
    colder = drawn(**{**settings, "temperature": 0.5})
    outside = drawn(temperature=0.8)
    assert exactness.rank_p_value(logits, right, settings) > 1e-3
    assert exactness.rank_p_value(logits, colder, settings) < 1e-4
    assert exactness.rank_p_value(logits, outside, settings) == 0.0


def test_the_table(check):
    result = bench_result(True, "bfloat16")
    slow = {**result, "captured": "none"}
    batches = {"table": "| B | baseline", "captured": "some", "provenance": {"arguments": {"random_weights": "some"}}}
    found = {RUN: result, "slow/bfloat16": slow, "batches": batches}
    wrong = check.not_captured(found)
    assert wrong == ["slow/bfloat16: ran without CUDA graphs", "batches: ran in part without CUDA graphs"]
    lines = check.report(found, {"exactness": "not finished within 9 s"}, wrong)
    (row,) = [line for line in lines if line.startswith(f"| {RUN}")]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        *("all", "11.10", "90%", "1.10", "30/3/8", "15.00", "1.50 !", "1.35", "20%"),
        *("2.40 at 2.24 (published 1.80)", "equal"),
    ]
    assert "- exactness: not finished within 9 s" in lines and "- slow/bfloat16: ran without CUDA graphs" in lines
    assert "| B | baseline" in lines


def test_only_float32_has_to_be_equal(check):
    assert check.differing({RUN: bench_result(False, "bfloat16")}) == []
    assert check.differing({RUN: bench_result(False, "float32")}) == [f"{RUN}: 30/3/8 differs"]


def test_the_bench_gets_the_run(check, tmp_path):
    args = check.parse(["--device", "cpu", "--repeats", "2"])
    command = check.bench_command(RUN, args, tmp_path)
    from vispec.evaluation import bench

    flags = bench.parse(command[2:])
    assert (flags.random_weights, flags.dtype, flags.draft_vocab) == ("Qwen2.5-VL-7B-Instruct", "bfloat16", 32768)
    assert (flags.device_map, flags.repeats, flags.trees) == ("cpu", 2, [TreeShape(30, 3, 8)])
    batches = script("bench_batches").parse(check.batches_command(args, tmp_path)[1:])
    assert (batches.random_weights, batches.dtype) == ("Qwen2.5-VL-3B-Instruct", "bfloat16")
    assert batches.tree == TreeShape(30, 3, 8)


def test_the_table_comes_whatever_happens(check, monkeypatch, tmp_path, capsys):
    done = tmp_path / "done.json"
    done.write_text(json.dumps(bench_result(True, "float32")))

    def command(run, args, out):
        write = f"import shutil; shutil.copy({str(done)!r}, {str(out / 'good-float32.json')!r})"
        return ["-c", write if run == "good/float32" else "raise SystemExit('no')"]

    monkeypatch.setattr(check, "bench_command", command)
    monkeypatch.setattr(check, "exactness_command", lambda args, out: ["no such script"])
    flags = ["--runs", "good/float32", "bad/float32", "--device", "cpu", "--out", str(tmp_path / "out")]
    flags += ["--batches", ""]
    assert check.main(flags) == 1
    printed = capsys.readouterr().out
    assert "| good/float32 |" in printed
    assert "- bad/float32: exit code 1: no" in printed
    assert "- exactness: exit code 2" in printed


def test_a_part_ends_in_time(check, tmp_path):
    reason = check.in_a_process(["-c", "import time; time.sleep(60)"], tmp_path / "log", limit=0.01)
    assert reason == "not finished within 0 s"

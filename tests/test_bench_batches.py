"""The benchmark of batches answers the same questions in every arm."""

import json
from pathlib import Path

import pytest
from script_files import script
from test_bench import tiny

from vispec import embedded
from vispec.evaluation.random_pairs import TARGETS

FAMILY = Path(__file__).parent / "golden" / "llava_next"


@pytest.fixture
def bench():
    return script("bench_batches")


def test_every_batch_size_is_measured(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedded, "TARGET", FAMILY / "target")
    monkeypatch.setattr(embedded, "DRAFT", FAMILY / "draft_vispec")
    file = tmp_path / "rows.json"
    options = ["--questions", "2", "--repetitions", "2", "--max-new-tokens", "6", "--json", str(file)]
    assert bench.main([*options, "--sizes", "1", "2"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["arm"], row["batch"]) for row in rows] == [(arm, size) for size in (1, 2) for arm in bench.ARMS]
    assert all(len(row["tokens_per_second"]) == 2 and min(row["tokens_per_second"]) > 0 for row in rows)
    assert [row["equal"] for row in rows] == [2] * 6
    assert "| 2 |" in capsys.readouterr().out


def test_a_pair_with_random_weights(bench, monkeypatch, tmp_path, capsys):
    """Prompts of several lengths; no answer ends early, and the table has a line for each size."""
    monkeypatch.setitem(TARGETS, "llama-135m", tiny("llama-135m"))
    file = tmp_path / "rows.json"
    options = ["--questions", "4", "--repetitions", "1", "--max-new-tokens", "5", "--dtype", "float32"]
    options += ["--sizes", "1", "4", "--json", str(file)]
    assert bench.main(["--random-weights", "llama-135m", *options]) == 0
    found = json.loads(file.read_text())
    assert [row["equal"] for row in found["rows"]] == [4] * 6 and found["captured"] == "none"
    printed = capsys.readouterr().out
    assert found["table"] in printed
    assert [line.split("|")[1].strip() for line in found["table"].splitlines()] == ["B", "---", "1", "4"]
    # what samples is not compared with generate(), which is greedy
    assert bench.main(["--random-weights", "llama-135m", *options, "--temperature", "1"]) == 0
    sampled = json.loads(file.read_text())
    assert {row["arm"] for row in sampled["rows"]} == {"baseline", "spec"} and "| - |" in sampled["table"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "6", "--sizes", "4"], "--questions 6: expected a multiple of --sizes 4"),
        (["--target", "somewhere"], "--target and --draft go together"),
        (["--random-weights", "llama-135m", "--target", "x", "--draft", "y"], "either random or read from --target"),
    ],
)
def test_flags_that_do_not_fit_are_refused(bench, flags, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert message in capsys.readouterr().err

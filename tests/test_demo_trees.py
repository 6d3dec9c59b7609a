"""Tree sizes compared in one run, with a recorded tiny pair in place of the shipped one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vispec import embedded
from vispec.demo import __main__ as demo
from vispec.demo import runner, tau, trees
from vispec.evaluation.measure import Answer

FAMILY = Path(__file__).parent / "golden" / "llava_next"


questions = runner.questions


def test_rows_are_those_of_the_trees(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(embedded, "TARGET", FAMILY / "target")
    monkeypatch.setattr(embedded, "DRAFT", FAMILY / "draft_vispec")
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", 12)
    file = tmp_path / "rows.json"
    asked = []
    monkeypatch.setattr(runner, "questions", lambda *part: asked.append(part) or questions(*part))
    options = ["--questions", "2", "--first-question", "30", "--repetitions", "1", "--json", str(file)]
    names = ["2/0/1", "30/3/8", "talon:mu=0.1,n=12,d=4,k=3"]
    assert trees.main([*options, "--trees", *names]) == 0
    assert asked == [(2, 30)]
    found = json.loads(file.read_text())
    assert found["provenance"]["arguments"]["trees"] == names
    small, large, talon = found["rows"]
    assert [row["tree"] for row in found["rows"]] == names
    assert (small["levels"], large["levels"]) == (1, 4) and 1 <= talon["levels"] <= 5 and talon["outputs_identical"]
    assert 0 < small["tau"] < large["tau"]  # only one node is drafted in the small one
    assert small["outputs_identical"] and large["outputs_identical"]
    assert "| 30/3/8 |" in capsys.readouterr().out


def test_no_question_both_chooses_a_tree_and_reports_it():
    chosen_on = {asked.scene_seed for asked in runner.questions(trees.QUESTIONS, trees.FIRST_QUESTION)}
    reported_on = {asked.scene_seed for asked in runner.questions(max(demo.QUESTIONS, tau.QUESTIONS))}
    assert len(chosen_on) == trees.QUESTIONS and not chosen_on & reported_on


def test_a_round_is_measured_in_plain_steps():
    baseline = Answer([1, 2, 3, 4, 5], 3, wall_time=9.0, decode_time=4.0, acceptance_lengths=[])
    spec = Answer([1, 2, 3, 4, 5], 1, wall_time=6.0, decode_time=3.0, acceptance_lengths=[1, 1])
    generate = replace(baseline, wall_time=12.0)
    row = trees._row("8/3/3", 4.0, [[baseline]], [[generate]], [[spec]])
    assert (row.tau, row.round_in_steps, row.speedup, row.outputs_identical) == (1.0, 1.5, 1.5, True)
    assert row.speedup_over_generate == 2.0


@pytest.mark.parametrize("text", ["12/3", "12/3/x", ""])
def test_a_tree_is_three_numbers(text, capsys):
    with pytest.raises(SystemExit):
        trees.main(["--trees", text])
    assert "total_token/depth/top_k" in capsys.readouterr().err

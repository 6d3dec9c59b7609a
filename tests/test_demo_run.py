"""The demo's main job, with a recorded tiny pair in place of the shipped one."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vispec import embedded
from vispec.acceptance import accepted_within
from vispec.demo import __main__ as demo
from vispec.demo import figure, runner
from vispec.demo.scenes import SPLIT_SEEDS

FAMILY = Path(__file__).parent / "golden" / "llava_next"


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(embedded, "TARGET", FAMILY / "target")
    monkeypatch.setattr(embedded, "DRAFT", FAMILY / "draft_vispec")
    monkeypatch.setattr(runner, "MAX_NEW_TOKENS", 12)


def test_demo_writes_table_summary_and_figure(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "REPETITIONS", 2)
    assert demo.main(["--out", str(tmp_path), "--questions", "2"]) == 0
    printed = capsys.readouterr().out
    for question in runner.questions(2):
        assert question.text in printed
    assert "float32 outputs identical: yes (2 of 2 questions)" in printed
    assert "bfloat16 outputs identical: " in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    ours = summary["methods"]["vispec"]
    assert ours["outputs_identical"] is True
    stored = [(answer["acceptance_lengths"], answer["new_tokens"]) for answer in summary["answers"]]
    lengths = [n for rounds, new in stored for n in accepted_within(rounds, len(rounds) - 1, new)]
    assert ours["tau"] == pytest.approx(sum(lengths) / len(lengths))
    speeds = [summary["methods"][name]["tokens_per_second"] for name in ("vispec", "baseline")]
    assert ours["speedup"] == pytest.approx(speeds[0] / speeds[1])
    generate = summary["methods"]["generate"]
    assert ours["speedup_over_generate"] == pytest.approx(speeds[0] / generate["tokens_per_second"])
    assert summary["methods"]["baseline"]["speedup"] == generate["speedup_over_generate"] == 1.0
    assert f"{ours['speedup']:>9.2f}x{ours['speedup_over_generate']:>11.2f}x" in printed
    assert summary["bfloat16"]["methods"].keys() == summary["methods"].keys() == {"generate", "baseline", "vispec"}
    assert summary["repetitions"] == 2 and summary["provenance"]["versions"]["torch"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 1000


def test_missing_weights_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "DRAFT", tmp_path)
    monkeypatch.setattr(embedded, "TARGET", FAMILY / "target")
    with pytest.raises(ValueError, match=r"vispec/demo/rebuild\.sh"):
        demo.main(["--out", str(tmp_path)])


def test_questions_are_about_unseen_scenes():
    asked = runner.questions(12)
    assert all(question.scene_seed in SPLIT_SEEDS["eval"] for question in asked)
    assert len({question.text for question in asked}) > 8
    assert [question.text for question in runner.questions(3)] == [question.text for question in asked[:3]]
    assert runner.questions(2, first=10) == asked[10:]


def test_medians_of_repetitions():
    answers = [runner.Answer([1, 2], 0, wall, decode, [0]) for wall, decode in ((3.0, 1.0), (1.0, 9.0), (2.0, 2.0))]
    reply = runner.Reply(runner.questions(1)[0], {"baseline": answers, "spec": answers}, pieces=[])
    assert (reply.measured("spec").wall_time, reply.measured("spec").decode_time) == (2.0, 2.0)


def test_lines_of_the_figure():
    pieces = [("The red circle", False), (" sits\nhere, ", True), ("far away", False)]
    rows = figure.wrapped(pieces, columns=12, lines=9)
    assert ["".join(c for c, _ in row) for row in rows] == ["The red", "circle sits", "here, far", "away"]
    assert [drafted for _, drafted in rows[1]] == [False] * 6 + [True] * 5
    cut = figure.wrapped(pieces, columns=12, lines=2)
    assert "".join(c for c, _ in cut[-1]).endswith("…") and len(cut[-1]) <= 12

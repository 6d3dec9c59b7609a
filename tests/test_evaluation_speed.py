"""Speedup and tau against hand computation from the lines of answer files."""

import json
from pathlib import Path

import pytest
from answer_files import SETTINGS, choice, write

from vispec.evaluation import speed
from vispec.evaluation.answer_file import FORMAT
from vispec.evaluation.comparison import round_in_steps
from vispec.evaluation.measure import Answer, drafted_flags


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    baseline = {
        1: [choice([5, 6, 7, 8], wall=2.0, decode=1.5)],
        2: [choice([5, 6], wall=0.5, decode=0.4)],
        3: [choice([5], wall=9.0, decode=0.0)],
    }
    spec = {
        2: [choice([5, 6], wall=0.4, decode=0.1, accepted=[0])],
        1: [choice([5, 6, 7, 9], wall=0.8, decode=0.5, accepted=[1, 3])],
        4: [choice([5], wall=1.0, decode=0.0, accepted=[])],
    }
    return (
        write(tmp_path / "b.jsonl", baseline, method="baseline"),
        write(tmp_path / "s.jsonl", spec, method="vispec"),
    )


def report(files, capsys) -> dict:
    assert speed.main(["--baseline", str(files[0]), "--spec", str(files[1]), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_measures(files, capsys):
    found = report(files, capsys)
    # only questions 1 and 2 are shared: speeds 4/2 and 2/0.5 against 4/0.8 and 2/0.4
    assert found["questions"] == 2 and found["questions_of_one_arm_only"] == 2
    assert found["baseline"]["tokens_per_second"] == pytest.approx(3.0)
    assert found["spec"]["tokens_per_second"] == pytest.approx(5.0)
    assert found["spec"]["ms_per_token"] == pytest.approx(200.0)
    assert found["speedup"] == pytest.approx(5 / 3)
    # without the first token and the prefill: 3/1.5 and 1/0.4 against 3/0.5 and 1/0.1
    assert found["decode_speedup"] == pytest.approx((6 + 10) / (2 + 2.5))
    # of the three tokens that the last round of question 1 accepted, two lie behind the answer's end
    assert found["tau"] == pytest.approx((1 + 1 + 0) / 3) and found["rounds"] == 3
    assert found["identical_questions"] == 1 and found["identical_share"] == 0.5
    assert "not counted" in found["tau_convention"] and found["provenance"]["versions"]


def test_printed_report(files, capsys):
    speed.main(["--baseline", str(files[0]), "--spec", str(files[1])])
    printed = capsys.readouterr()
    assert "speedup              1.67x over 2 questions" in printed.out
    assert "1 of 2 questions" in printed.out
    assert "2 question(s) that only one arm has answered" in printed.err


def test_several_choices_count_as_one_question(tmp_path, capsys):
    baseline = write(tmp_path / "b.jsonl", {1: [choice([1, 2], 1.0, 0.9), choice([1, 2, 3, 4], 1.0, 0.9)]})
    spec = write(tmp_path / "s.jsonl", {1: [choice([1, 2], 0.5, 0.4, [0]), choice([1, 2, 3, 4], 0.5, 0.4, [3])]})
    found = report((baseline, spec), capsys)
    assert found["baseline"]["tokens_per_second"] == pytest.approx(3.0)
    assert found["speedup"] == pytest.approx(2.0) and found["tau"] == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["max_new_tokens", "dtype", "temperature", "base_model"])
def test_arms_with_other_settings_are_refused(files, name):
    meta = files[1].with_name("s.jsonl.meta.json")
    other = 7 if name in ("max_new_tokens", "temperature") else "other"
    meta.write_text(json.dumps({"format": FORMAT, "settings": SETTINGS | {name: other}}))
    with pytest.raises(ValueError, match=f"cannot be compared: {name} is"):
        speed.main(["--baseline", str(files[0]), "--spec", str(files[1])])


def test_missing_and_misplaced_files(files):
    with pytest.raises(ValueError, match="there is no answer file"):
        speed.main(["--baseline", str(files[0]), "--spec", str(files[1]) + "x"])
    with pytest.raises(ValueError, match="answers of a speculative method"):
        speed.main(["--baseline", str(files[1]), "--spec", str(files[1])])
    write(files[1], {1: [choice([5, 6], 0.4, 0.1, accepted=[], plain_steps=1)]}, method="vispec")
    with pytest.raises(ValueError, match="answers of a speculative method"):
        speed.main(["--baseline", str(files[1]), "--spec", str(files[1])])


def test_no_common_question(files, tmp_path):
    other = write(tmp_path / "o.jsonl", {7: [choice([1], 1.0, 0.0, [])]})
    with pytest.raises(ValueError, match="no question in common"):
        speed.main(["--baseline", str(files[0]), "--spec", str(other)])


def test_without_settings_there_is_a_notice(files, capsys):
    files[0].with_name("b.jsonl.meta.json").unlink()
    report(files, capsys)
    speed.main(["--baseline", str(files[0]), "--spec", str(files[1])])
    assert "is not checked" in capsys.readouterr().err


def test_the_two_forms_of_the_command_exclude_each_other(files, tmp_path, capsys):
    for argv, line in (
        (["--results", str(tmp_path), "--spec", str(files[1])], "--results stands alone"),
        (["--results", str(tmp_path), "--json"], "--results stands alone"),
        (["--spec", str(files[1])], "expected either --results DIR, or --baseline FILE with --spec FILE"),
        (["--baseline", str(files[0]), "--spec", str(files[1]), "--format", "csv"], "belong to --results"),
    ):
        with pytest.raises(SystemExit) as left:
            speed.main(argv)
        printed = capsys.readouterr().err
        assert left.value.code == 2 and line in printed and printed.count("\n") == 1


def test_cost_of_a_round():
    # 0.6 s for 2 rounds against 1 s for 10 plain steps
    plain, ours = Answer([1] * 11, 9, 9.0, 1.0, []), Answer([1] * 11, 1, 9.0, 0.6, [4, 4])
    assert round_in_steps([[plain]], [[ours]]) == pytest.approx(3.0)
    assert round_in_steps([[plain]], [[Answer([1], -1, 9.0, 0.0, [])]]) is None
    # what holds plain steps does not say how long its rounds took
    mixed = Answer([1] * 11, 6, 9.0, 5.0, [3])
    assert round_in_steps([[plain]], [[ours], [mixed]]) == pytest.approx(3.0)
    assert round_in_steps([[plain]], [[mixed], [Answer([1] * 11, 9, 9.0, 1.0, [])]]) is None


def test_plain_steps_are_no_rounds(files, capsys):
    """As `--tree auto` answers: a part of the steps has no draft, or none has one."""
    settings = {"method": "vispec", "tree": "auto"}
    some = {1: [choice([5, 6, 7, 8], 0.8, 0.5, accepted=[1], plain_steps=1)], 2: [choice([5, 6], 0.4, 0.1, [], 1)]}
    write(files[1], some, **settings)
    found = report(files, capsys)
    assert (found["tau"], found["rounds"], found["plain_steps"]) == (1.0, 1, 2) and found["speedup"] == 5 / 3
    speed.main(["--baseline", str(files[0]), "--spec", str(files[1])])
    assert "tau                  1.00 over 1 rounds beside 2 plain steps; " in capsys.readouterr().out
    write(files[1], {2: some[2]}, **settings)
    found = report(files, capsys)
    assert (found["tau"], found["rounds"], found["plain_steps"]) == (None, 0, 1)
    speed.main(["--baseline", str(files[0]), "--spec", str(files[1])])
    assert "tau                  - over 0 rounds beside 1 plain steps; " in capsys.readouterr().out


def test_drafted_flags():
    answer = Answer([1, 2, 3, 4, 5, 6], last_round=1, wall_time=1, decode_time=1, acceptance_lengths=[2, 0, 4])
    assert drafted_flags(answer) == [False, True, True, False, False, True]


def test_arms_of_two_targets_in_one_folder_are_refused(tmp_path):
    answers = {1: [choice([5, 6], wall=2.0, decode=1.5)]}
    baseline = write(tmp_path / "b.jsonl", answers, method="baseline", base_model="t", base_model_revision="old")
    spec = write(tmp_path / "s.jsonl", answers, method="vispec", base_model="t", base_model_revision="new")
    with pytest.raises(ValueError, match=r"compared: base_model_revision is 'old' in \S*b.jsonl and 'new' in"):
        speed.main(["--baseline", str(baseline), "--spec", str(spec)])


def test_arms_that_ran_otherwise_are_told(tmp_path, capsys):
    def made_by(torch: str, revision: str | None = None) -> dict:
        return {"versions": {"torch": torch, "transformers": "4.51.3"}, "git_revision": revision}

    kernels = {"float32 8x8 1": "linear", "float32 8x16 1": "mkl", "float32 8x8 12": "mkl"}
    plain = [choice([5, 6], wall=2.0, decode=1.5) | {"captured": "all", "kernels": {"float32 8x8 1": "onednn"}}]
    ours = [choice([5, 6], wall=1.0, decode=0.5, accepted=[0]) | {"captured": "none", "kernels": kernels}]
    baseline = write(tmp_path / "b.jsonl", {1: plain}, made_by("2.6", "abc"), method="baseline", layers="lean")
    spec = write(tmp_path / "s.jsonl", {1: ours}, made_by("2.7"), method="vispec", layers="stock")
    assert speed.main(["--baseline", str(baseline), "--spec", str(spec)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"notice: the arms differ in {name}: {there} in {baseline}, {here} in {spec}"
        for name, there, here in (
            ("torch", "2.6", "2.7"),
            ("decoder layers", "lean", "stock"),
            ("captured steps", "all", "none"),
            ("the kernel of float32 8x8 1", "onednn", "linear"),
        )
    ]

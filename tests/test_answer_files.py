"""Answer files while they are filled."""

import shutil
from pathlib import Path

import answer_files
import benchmark_rows
import pytest

from vispec.evaluation import answering, gen_baseline_answer_gqa, run_all
from vispec.evaluation.answers import AnswerFile, answer_line, answers_of, read_meta
from vispec.evaluation.measure import Answer

TARGET = str(Path(__file__).parent / "golden" / "llava_next" / "target")


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with one question of GQA."""
    folder = tmp_path / "data" / "gqa"
    folder.mkdir(parents=True)
    benchmark_rows.write_one("gqa", folder)
    return folder


def test_one_run_at_a_time_fills_a_file(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    one, other = AnswerFile(path), AnswerFile(path)
    with one.alone():
        one.begin({"method": "baseline"}, {})
        one.append({"question_id": 7})
        with pytest.raises(ValueError, match=r"a\.jsonl is being filled by another run"), other.alone():
            pytest.fail("two runs have the file")
        one.finish()
        with pytest.raises(ValueError, match=r"a\.jsonl is being filled by another run"), other.alone():
            pytest.fail("two runs have the file")
    assert not other.lines
    with other.alone():
        assert other.lines.keys() == {7}, "it is read when it is free"
    assert {found.name for found in path.parent.iterdir()} == {"a.jsonl", "a.jsonl.meta.json"}
    with AnswerFile(path).alone():
        pass  # what ends frees it


def test_commands_leave_a_file_alone_that_another_run_fills(tmp_path, data, monkeypatch):
    monkeypatch.setattr(answering, "load_models", lambda *a: pytest.fail("the models were loaded"))
    path = answer_files.write(tmp_path / "gqa" / "lookup-temperature-0.0.jsonl", {1: []})
    before = path.read_bytes()
    single = ["--base-model-path", TARGET, "--data-folder", str(data), "--answer-file", str(path)]
    together = ["--base-model-path", TARGET, "--data-root", str(data.parent), "--out", str(tmp_path)]
    with AnswerFile(path).alone():
        with pytest.raises(ValueError, match=r"gqa/lookup-temperature-0\.0\.jsonl is being filled by another run"):
            gen_baseline_answer_gqa.main(single)
        with pytest.raises(ValueError, match=r"gqa/lookup-temperature-0\.0\.jsonl is being filled by another run"):
            run_all.main([*together, "--benchmarks", "gqa"])
    assert path.read_bytes() == before
    with AnswerFile(path.with_name("baseline-temperature-0.0.jsonl")).alone():
        pass  # the files that were free are free again


def test_the_lock_of_a_killed_run_keeps_nobody_out(tmp_path):
    (tmp_path / ".a.jsonl.lock").touch()
    with AnswerFile(tmp_path / "a.jsonl").alone():
        pass
    assert not list(tmp_path.iterdir())


def test_a_question_is_left_out_until_it_is_answered(tmp_path):
    file = AnswerFile(tmp_path / "a.jsonl")
    file.begin({"method": "baseline"}, {})
    for name in (9, 5, 9):
        file.leave_out(name, "no picture")
    file.finish()
    again = AnswerFile(file.path)
    again.begin({"method": "baseline"}, {})
    again.append({"question_id": 5})
    again.leave_out(3, "no picture either")
    assert [one["question_id"] for one in read_meta(file.path)["left_out"]] == [3, 9], "kept without a finish"
    again.finish()
    assert read_meta(file.path)["left_out"] == [
        {"question_id": 3, "reason": "no picture either"},
        {"question_id": 9, "reason": "no picture"},
    ]
    assert AnswerFile(file.path).lines.keys() == {5}


def test_a_choice_says_whether_its_steps_were_captured(tmp_path):
    """Readers of the answers do without it, as older files do."""
    answers = [Answer([5, 6], 0, 2.0, 1.0, [1]), Answer([7], -1, 1.0, 0.0, [])]
    line = answer_line(3, "tiny", "vispec", [(answers[0], "a", "all"), (answers[1], "b", "some")])
    assert [(one["index"], one["turns"], one.pop("captured")) for one in line["choices"]] == [
        (0, ["a"], "all"),
        (1, ["b"], "some"),
    ]
    assert answers_of(line, tmp_path) == answers


def test_a_retrained_target_does_not_go_on_with_the_answers_of_the_old_one(tmp_path, data, monkeypatch):
    target = Path(shutil.copytree(TARGET, tmp_path / "target"))
    flags = ["--base-model-path", str(target), "--data-folder", str(data), "--answer-file", str(tmp_path / "a")]
    flags += ["--temperature", "0", "--max-new-token", "2"]
    assert gen_baseline_answer_gqa.main(flags) == 0
    settings = read_meta(tmp_path / "a")["settings"]
    assert settings["base_model_revision"].startswith("files-sha256:") and settings["layers"] == "lean"
    content = bytearray((target / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (target / "model.safetensors").write_bytes(content)
    monkeypatch.setattr(answering, "load_models", lambda *a: pytest.fail("the models were loaded"))
    with pytest.raises(ValueError, match="a was made with base_model_revision 'files-sha256:.*, found 'files-sha256:"):
        gen_baseline_answer_gqa.main(flags)

"""The comparison of output ids between two arms' answer files."""

import json
import os
import shutil
from pathlib import Path

import benchmark_rows
import pytest

from vispec.evaluation import answerer, gen_baseline_answer_gqa, gen_spec_answer_gqa
from vispec.evaluation.answer_file import FORMAT
from vispec.evaluation.loading import Models
from vispec.evaluation.lossless import check_lossless, find_baseline, first_position, wants_check
from vispec.evaluation.task import Task

FAMILY = Path(__file__).parent / "golden" / "llava_next"
SETTINGS = {"benchmark": "gqa", "temperature": 0.0, "max_new_tokens": 9, "dtype": "float32", "num_choices": 1}


def write(path: Path, answers: dict[int, list[list[int]]], method: str, **settings) -> Path:
    """An answer file: the output ids of each question's choices."""
    lines = []
    for question, choices in answers.items():
        fields = {"turns": ["x"], "idxs": [0], "wall_time": [1.0], "decode_time": [0.5]}
        lines.append({"question_id": question, "choices": [fields | {"output_ids": [ids]} for ids in choices]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"format": FORMAT, "settings": SETTINGS | {"method": method} | settings}
    path.with_name(path.name + ".meta.json").write_text(json.dumps(meta))
    return path


def task(path: Path) -> Task:
    return Task(path, {"method": "vispec"})


def no_rerun(question):
    pytest.fail("a question was answered again")


def check(path: Path, rerun=no_rerun) -> tuple[bool, dict]:
    same = check_lossless(task(path), required=True, rerun=rerun)
    return same, json.loads(path.with_name(path.name + ".meta.json").read_text())["lossless"]


@pytest.mark.parametrize(
    ("ids", "others", "position"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 4, 3], 1), ([1, 2], [1, 2, 3], 2), ([7], [8], 0)],
)
def test_where_two_answers_part(ids, others, position):
    assert first_position(ids, others) == position == first_position(others, ids)


def test_same_answers(tmp_path, capsys):
    write(tmp_path / "b.jsonl", {1: [[5, 6]], 2: [[7]], 3: [[8]]}, "baseline")
    same, note = check(write(tmp_path / "s.jsonl", {2: [[7]], 1: [[5, 6]]}, "vispec"))
    assert same and note == {"baseline": "b.jsonl", "questions": 2, "identical": 2}
    assert "lossless: 2 of 2 questions (100.0 %)" in capsys.readouterr().out


def test_a_difference_in_float32_fails(tmp_path, capsys):
    write(tmp_path / "b.jsonl", {1: [[5, 6]], 2: [[7], [7, 8, 9]], 3: [[1]]}, "baseline")
    same, note = check(write(tmp_path / "s.jsonl", {1: [[5, 6]], 2: [[7], [7, 8, 1]], 3: [[2]]}, "vispec"))
    assert not same and (note["questions"], note["identical"]) == (3, 1)
    assert note["first_difference"] == {"question_id": 2, "choice": 1, "turn": 0, "position": 2}
    printed = capsys.readouterr()
    assert "1 of 3 questions (33.3 %)" in printed.out and "question 2, at new token 2" in printed.out
    assert "error: the arms differ in float32" in printed.err


@pytest.mark.parametrize(("again", "expected"), [(([5, 6], [5, 6]), True), (([5, 6], [5, 7]), False)])
def test_a_difference_in_half_precision_is_looked_at_in_float32(tmp_path, again, expected, capsys):
    write(tmp_path / "b.jsonl", {1: [[5, 6]], 2: [[7]]}, "baseline", dtype="bfloat16")
    path = write(tmp_path / "s.jsonl", {1: [[5, 7]], 2: [[7]]}, "vispec", dtype="bfloat16")
    asked = []
    same, note = check(path, rerun=lambda question: asked.append(question) or again)
    assert asked == [1] and same == note["identical_in_float32"] == expected
    assert "question 1 again in float32" in "".join(capsys.readouterr())


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nTried to allocate"), MemoryError()])
def test_without_room_for_float32_the_check_goes_on(tmp_path, error, capsys):
    def fail(question):
        raise error

    write(tmp_path / "b.jsonl", {1: [[5, 6]]}, "baseline", dtype="bfloat16")
    same, note = check(write(tmp_path / "s.jsonl", {1: [[5, 7]]}, "vispec", dtype="bfloat16"), rerun=fail)
    reason = "CUDA out of memory. Tried to allocate" if str(error) else "MemoryError"
    assert same and note["not_answered_in_float32"] == reason and "identical_in_float32" not in note
    said = f"lossless: question 1 cannot be answered again in float32: {reason}\n"
    assert said in capsys.readouterr().out


def test_differences_are_noted_before_anything_is_answered_again(tmp_path):
    def killed(question):
        raise KeyboardInterrupt

    write(tmp_path / "b.jsonl", {1: [[5, 6]], 2: [[7]]}, "baseline", dtype="bfloat16")
    path = write(tmp_path / "s.jsonl", {1: [[5, 7]], 2: [[7]]}, "vispec", dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        check(path, rerun=killed)
    note = json.loads(path.with_name(path.name + ".meta.json").read_text())["lossless"]
    assert (note["questions"], note["identical"], note["first_difference"]["question_id"]) == (2, 1, 1)


def test_what_keeps_models_from_float32_is_found_out_once(tmp_path, monkeypatch):
    tries = []

    def no_room(models):
        tries.append(models.dtype)
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(answerer, "load_models", no_room)
    target = str(FAMILY / "target")
    large = answerer.InFloat32(Models(target, dtype="bfloat16"))
    for _ in range(2):
        with pytest.raises(ValueError, match="not enough memory"):
            large.ids_of(None)
    assert tries == ["float32"]
    shutil.copytree(target, tmp_path / "quantised")
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised is quantised"):
        answerer.InFloat32(Models(str(tmp_path / "quantised"))).ids_of(None)
    assert len(tries) == 1


def test_the_baseline_has_the_same_settings(tmp_path, capsys):
    spec = write(tmp_path / "s.jsonl", {1: [[5]]}, "vispec")
    write(tmp_path / "other.jsonl", {1: [[5]]}, "eagle2")
    write(tmp_path / "cap.jsonl", {1: [[5]]}, "baseline", max_new_tokens=8)
    write(tmp_path / "half.jsonl", {1: [[5]]}, "baseline", dtype="bfloat16")
    write(tmp_path / "sqa.jsonl", {1: [[5]]}, "baseline", benchmark_options={"shot_number": 1})
    (tmp_path / "gone.jsonl.meta.json").write_text(json.dumps({"format": FORMAT, "settings": SETTINGS}))
    assert find_baseline(task(spec)) is None
    (tmp_path / "older").touch()
    (tmp_path / "older.meta.json").write_text(json.dumps({"settings": SETTINGS | {"method": "baseline"}}))
    assert find_baseline(task(spec)) is None
    assert "notice: not compared with: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="no baseline's answer file of the same settings in"):
        check_lossless(task(spec), required=True, rerun=no_rerun)
    assert check_lossless(task(spec), required=False, rerun=no_rerun)
    right = write(tmp_path / "right", {1: [[5]]}, "baseline")
    assert find_baseline(task(spec)) == right
    older = write(tmp_path / "older", {1: [[5]]}, "baseline")
    os.utime(older, (1, 1))
    assert find_baseline(task(spec)) == right


def test_nothing_in_common(tmp_path, capsys):
    write(tmp_path / "b.jsonl", {1: [[5]]}, "baseline")
    same, note = check(write(tmp_path / "s.jsonl", {2: [[7]]}, "vispec"))
    assert same and note["questions"] == 0 and "has answered none of these" in capsys.readouterr().out


def test_when_it_is_checked():
    assert wants_check(None, 0.0) and not wants_check(None, 1.0)
    assert wants_check(True, 0.0) and not wants_check(False, 0.0) and not wants_check(False, 1.0)
    with pytest.raises(ValueError, match="--check-lossless=True: expected --temperature 0, found 0.7"):
        wants_check(True, 0.7)


def test_command_line_in_bfloat16(tmp_path, monkeypatch, capsys):
    """A baseline's answer that is changed by hand shows, and is the same again in float32."""
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    data = tmp_path / "data"
    data.mkdir()
    benchmark_rows.write_one("gqa", data)
    flags = ["--base-model-path", str(FAMILY / "target"), "--data-folder", str(data), "--dtype", "bfloat16"]
    flags += ["--temperature", "0", "--max-new-token", "5"]
    baseline, spec = tmp_path / "b.jsonl", tmp_path / "s.jsonl"
    gen_baseline_answer_gqa.main([*flags, "--answer-file", str(baseline)])
    (line,) = [json.loads(text) for text in baseline.read_text().splitlines()]
    line["choices"][0]["output_ids"][0][3] = 2
    baseline.write_text(json.dumps(line) + "\n")
    flags += ["--spec-model-path", str(FAMILY / "draft_vispec"), "--use-ours=True", "--answer-file", str(spec)]
    assert gen_spec_answer_gqa.main([*flags, "--check-lossless=False"]) == 0
    assert "lossless" not in capsys.readouterr().out
    assert gen_spec_answer_gqa.main(flags) == 0
    printed = capsys.readouterr().out
    assert "0 of 1 questions (0.0 %)" in printed and "at new token 3" in printed
    assert "question 207 again in float32: both arms give the same 5 output ids" in printed
    shutil.move(baseline, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="--check-lossless=True: no baseline's answer file"):
        gen_spec_answer_gqa.main([*flags, "--check-lossless"])

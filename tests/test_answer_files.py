"""Answer files while they are filled."""

import errno
import fcntl
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import answer_files
import benchmark_rows
import pytest

from vispec.evaluation import answerer, gen_baseline_answer_gqa, run_all, speed
from vispec.evaluation.answer_file import AnswerFile, answer_line, answers_of, choice_of, read_answers, read_meta
from vispec.evaluation.measure import Answer
from vispec.evaluation.task import Task

TARGET = str(Path(__file__).parent / "golden" / "llava_next" / "target")


LOADED = {"baseline": {}}
ANSWERED = [answer_files.choice([5], 1.0, 0.0)]


def baseline(path: Path) -> Task:
    return Task(path, {"method": "baseline"})


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with one question of GQA."""
    folder = tmp_path / "data" / "gqa"
    folder.mkdir(parents=True)
    benchmark_rows.write_one("gqa", folder)
    return folder


def test_one_run_at_a_time_fills_a_file(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    one, other = baseline(path), baseline(path)
    with one.alone():
        one.begin(LOADED, {})
        one.append(7, ANSWERED)
        with pytest.raises(ValueError, match=r"a\.jsonl is being filled by another run"), other.alone():
            pytest.fail("two runs have the file")
        one.finish()
        with pytest.raises(ValueError, match=r"a\.jsonl is being filled by another run"), other.alone():
            pytest.fail("two runs have the file")
    assert not other.lines
    with other.alone():
        assert other.lines.keys() == {7}, "it is read when it is free"
    assert {found.name for found in path.parent.iterdir()} == {"a.jsonl", "a.jsonl.meta.json"}
    with baseline(path).alone():
        pass  # what ends frees it


def test_commands_leave_a_file_alone_that_another_run_fills(tmp_path, data, monkeypatch):
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    path = answer_files.write(tmp_path / "gqa" / "lookup-temperature-0.0.jsonl", {1: []})
    before = path.read_bytes()
    single = ["--base-model-path", TARGET, "--data-folder", str(data), "--answer-file", str(path)]
    together = ["--base-model-path", TARGET, "--data-root", str(data.parent), "--out", str(tmp_path)]
    with baseline(path).alone():
        with pytest.raises(ValueError, match=r"gqa/lookup-temperature-0\.0\.jsonl is being filled by another run"):
            gen_baseline_answer_gqa.main(single)
        with pytest.raises(ValueError, match=r"gqa/lookup-temperature-0\.0\.jsonl is being filled by another run"):
            run_all.main([*together, "--benchmarks", "gqa"])
    assert path.read_bytes() == before
    with baseline(path.with_name("baseline-temperature-0.0.jsonl")).alone():
        pass  # the files that were free are free again


def test_the_lock_of_a_killed_run_keeps_nobody_out(tmp_path):
    (tmp_path / ".a.jsonl.lock").touch()
    with baseline(tmp_path / "a.jsonl").alone():
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_where_there_are_no_locks_answers_are_written_all_the_same(tmp_path, data, monkeypatch, capsys, code):
    def flock(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    file = baseline(tmp_path / "a.jsonl")
    with file.alone():
        file.begin(LOADED, {})
        file.append(7, ANSWERED)
    printed = capsys.readouterr().err
    assert printed.startswith("notice: ") and printed.count("\n") == 1
    assert {found.name for found in tmp_path.iterdir()} == {"a.jsonl", "a.jsonl.meta.json", "data"}


def test_a_question_is_left_out_until_it_is_answered(tmp_path):
    file = baseline(tmp_path / "a.jsonl")
    file.begin(LOADED, {})
    for name in (9, 5, 9):
        file.leave_out(name, "no picture")
    file.finish()
    again = baseline(file.path)
    again.begin(LOADED, {})
    again.append(5, ANSWERED)
    again.leave_out(3, "no picture either")
    assert [one["question_id"] for one in read_meta(file.path)["left_out"]] == [3, 9], "kept without a finish"
    again.finish()
    assert read_meta(file.path)["left_out"] == [
        {"question_id": 3, "reason": "no picture either"},
        {"question_id": 9, "reason": "no picture"},
    ]
    assert AnswerFile(file.path).lines.keys() == {5}


def test_a_choice_says_whether_its_steps_were_captured():
    """Readers of the answers do without it, as older files do."""
    answers = [Answer([5, 6], 0, 2.0, 1.0, [1]), Answer([7], -1, 1.0, 0.0, [])]
    models = [SimpleNamespace(captured=told, target=SimpleNamespace(kernels={})) for told in ("all", "some")]
    choices = [choice_of([one], text, model, "vispec") for one, text, model in zip(answers, "ab", models, strict=True)]
    line = answer_line(3, "tiny", "vispec", choices)
    assert [(one["index"], one["turns"], one.pop("captured")) for one in line["choices"]] == [
        (0, ["a"], "all"),
        (1, ["b"], "some"),
    ]
    assert answers_of(line) == answers


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
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    with pytest.raises(ValueError, match="a was made with base_model_revision 'files-sha256:.*, found 'files-sha256:"):
        gen_baseline_answer_gqa.main(flags)


def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path, data):
    flags = ["--base-model-path", TARGET, "--data-folder", str(data), "--answer-file"]
    notes = tmp_path / "n.txt"
    for content, line in (
        ("my notes", r"n\.txt: the last line is no line of an answer file: 'my notes'"),
        ("my notes\n", r"n\.txt, line 1: this is no line of an answer file: "),
        ('{"question_id": 1}', r"n\.txt is there, but no n\.txt\.meta\.json beside it, so it cannot be continued"),
    ):
        notes.write_text(content)
        with pytest.raises(ValueError, match=line):
            gen_baseline_answer_gqa.main([*flags, str(notes)])
        assert notes.read_text() == content
    # nor what stands behind settings of ours, where a run was killed before its first answer
    path = answer_files.write(tmp_path / "killed.jsonl", {})
    path.write_text("my notes")
    with pytest.raises(ValueError, match="the last line is no line of an answer file: 'my notes'"):
        gen_baseline_answer_gqa.main([*flags, str(path)])
    assert path.read_text() == "my notes"
    (tmp_path / "null").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="null is no regular file, give another --answer-file$"):
        gen_baseline_answer_gqa.main([*flags, str(tmp_path / "null")])
    assert not (tmp_path / "null.meta.json").exists() and (tmp_path / "null").is_char_device()


def test_answers_of_another_format_are_refused(tmp_path, data):
    path = answer_files.write(tmp_path / "a.jsonl", {1: []})
    meta = path.with_name("a.jsonl.meta.json")
    values = json.loads(meta.read_text())
    for found, name in ((None, "1"), ("x", "'x'"), (99, "99")):
        meta.write_text(json.dumps({key: value for key, value in {**values, "format": found}.items() if value}))
        flags = ["--base-model-path", TARGET, "--data-folder", str(data), "--answer-file", str(path)]
        line = f"a.jsonl.meta.json: these answers are of format {name}, this version of vispec has format "
        with pytest.raises(ValueError, match=line):
            gen_baseline_answer_gqa.main(flags)
        with pytest.raises(ValueError, match=line):
            speed.main(["--baseline", str(path), "--spec", str(path)])


GOOD = answer_files.choice([5, 6], 1.0, 0.5, [0])
NO_LINES = {
    b"[": "Expecting value",
    b"[" * 100_000 + b"]" * 100_000: "nested too deep",
    b"\xff": "",
    '{"question_id": "caf\u00e9"}'.encode("latin-1"): "not UTF-8",
    b"[]": r"expected an object with a question_id, found \[\]",
    b'{"question_id": [1]}': "expected an object with a question_id",
    b'{"question_id": true}': "expected an object with a question_id",
    b'{"question_id": 1}': "question 1: expected a list of choices, found None",
    b'{"question_id": 1, "choices": [5]}': "question 1: expected a choice as an object, found 5",
    **{
        json.dumps(answer_files.line(1, GOOD | {name: value})).encode(): f"question 1: {name}: expected "
        for name, value in (
            ("acceptance_length", 5),
            ("acceptance_length", ["1"]),
            ("acceptance_length", [-1]),
            ("wall_time", ["1"]),
            ("wall_time", [0]),
            ("wall_time", [float("nan")]),
            ("decode_time", [float("inf")]),
            ("decode_time", [10**400]),
            ("output_ids", [[]]),
            ("output_ids", [[1.5]]),
            ("idxs", [True]),
            ("captured", 3),
            ("kernels", {"float32 8x8 1": 3}),
        )
    },
    json.dumps(answer_files.line(1, GOOD | {"idxs": [0, 0]})).encode(): "expected one entry for each turn in all of ",
}


@pytest.mark.parametrize("text", NO_LINES, ids=range(len(NO_LINES)))
def test_a_line_that_is_no_answer_is_named(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(answer_files.line(0)).encode() + b"\n\n" + text + b"\n")
    for read in (read_answers, baseline):
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: this is no line .*: .*{NO_LINES[text]}"):
            read(path)


def test_what_other_editors_leave_is_read(tmp_path):
    """A mark at the beginning of UTF-8, and Windows' ends of lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(answer_files.line(7)).encode() + b"\r\n")
    file = read_answers(path)
    assert file.lines == {7: answer_files.line(7)} and not file.torn


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"settings": []}',
        '{"format": 2, "settings": {"temperature": "0"}}',
        '{"format": 2, "settings": {"tree": [30, 3]}}',
        '{"format": 2, "settings": {"tree": "talon:mu=9"}}',
        '{"format": 2, "settings": {"draft_vocab": 5}}',
        '{"format": 2, "settings": {}, "resumed": [1]}',
        '{"format": 2, "settings": {}, "left_out": [{"question_id": 1}]}',
        '{"format": 2, "settings": {}, "provenance": []}',
        '{"format": 2, "settings": {}, "resumed": [{"versions": "2.6"}]}',
    ],
)
def test_settings_that_are_none_are_named(tmp_path, text):
    (tmp_path / "a.jsonl.meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.jsonl\.meta\.json: "):
        read_meta(tmp_path / "a.jsonl")

"""All methods on the made benchmarks by one command, with the recorded tiny models."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny_models import random_head

from vispec import SpecModel
from vispec.demo import make_benchmarks
from vispec.evaluation import answerer, gen_spec_answer_gqa, run_all, speed
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.model.drafts.checkpoints import save_draft
from vispec.model.shape import TreeShape

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, VISPEC, EAGLE2 = (str(FAMILY / name) for name in ("target", "draft_vispec", "draft_eagle2"))
HEADS = ["--spec-model-path", f"vispec={VISPEC}", f"eagle2={EAGLE2}"]
METHODS = ["baseline", "vispec", "eagle2", "lookup"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two of the eight folders."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_benchmarks, "WRITERS", {n: make_benchmarks.WRITERS[n] for n in ("gqa", "coco")})
        make_benchmarks.main(["--out", str(folder), "--count", "3"])
    return folder


@pytest.fixture(autouse=True)
def _one_warm_up(monkeypatch):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)


def flags(data: Path, out: Path, *more: str) -> list[str]:
    where = ["--base-model-path", TARGET, "--data-root", str(data), "--out", str(out)]
    return [*where, *HEADS, "--max-new-token", "6", "--benchmarks", "gqa", "coco_caption", *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A whole run; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answerer, "WARM_UPS", 1)
        assert run_all.main(flags(data, out, "--temperatures", "0", "1")) == 0
    return out


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> dict:
    return {line["question_id"]: line["choices"][0]["output_ids"] for line in read(path)}


def meta(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".meta.json").read_text())


def test_a_file_for_each_benchmark_method_and_temperature(finished):
    for benchmark in ("gqa", "coco_caption"):
        found = {path.name for path in (finished / benchmark).glob("*.jsonl")}
        assert found == {f"{method}-temperature-{t}.jsonl" for method in METHODS for t in ("0.0", "1.0")}
        baseline = ids(finished / benchmark / "baseline-temperature-0.0.jsonl")
        assert len(baseline) == 3
        for method in METHODS[1:]:
            path = finished / benchmark / f"{method}-temperature-0.0.jsonl"
            assert ids(path) == baseline
            assert meta(path)["lossless"] == {
                "baseline": "baseline-temperature-0.0.jsonl",
                "questions": 3,
                "identical": 3,
            }
            assert "lossless" not in meta(finished / benchmark / f"{method}-temperature-1.0.jsonl")


def test_the_report_reads_the_files(finished, capsys):
    arms = [str(finished / "gqa" / f"{method}-temperature-0.0.jsonl") for method in ("baseline", "lookup")]
    assert speed.main(["--baseline", arms[0], "--spec", arms[1]]) == 0
    assert "identical output ids 3 of 3 questions" in capsys.readouterr().out


def test_a_single_command_goes_on_with_a_file(finished, data, tmp_path, monkeypatch):
    shutil.copytree(finished / "gqa", tmp_path / "gqa")
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    one = ["--base-model-path", TARGET, "--spec-model-path", EAGLE2, "--data-folder", str(data / "gqa")]
    one += ["--answer-dir", str(tmp_path), "--model-id", "eagle2", "--temperature", "0", "--max-new-token", "6"]
    assert gen_spec_answer_gqa.main(one) == 0


def test_arms_that_ran_otherwise_are_told(finished, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "answers")
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    assert run_all.main(flags(data, tmp_path / "answers")) == 0
    assert "differ" not in capsys.readouterr().err
    path = tmp_path / "answers" / "gqa" / "lookup-temperature-0.0.jsonl"
    found = meta(path)
    found["provenance"]["versions"]["torch"] = "1.0"
    path.with_name(path.name + ".meta.json").write_text(json.dumps(found))
    assert run_all.main(flags(data, tmp_path / "answers")) == 0
    (notice,) = [line for line in capsys.readouterr().err.splitlines() if "differ" in line]
    assert notice.startswith("notice: the arms differ in torch: ") and notice.endswith(f", 1.0 in {path}")


def test_trees_that_are_chosen_while_it_answers(finished, data, tmp_path, capsys):
    assert run_all.main(flags(data, tmp_path, "--tree", "auto", "--benchmarks", "gqa")) == 0
    baseline = ids(tmp_path / "gqa" / "baseline-temperature-0.0.jsonl")
    for method in METHODS[1:]:
        path = tmp_path / "gqa" / f"{method}-temperature-0.0.jsonl"
        assert ids(path) == baseline and meta(path)["settings"]["tree"] == "auto"
    assert speed.main(["--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("tree auto, chosen while it answers.\n") == 3


def test_each_method_has_its_own_measured_tree(data, tmp_path, monkeypatch):
    """Measured once for all files of a method, and kept by later runs; a method that comes later is measured then."""
    trees = {"vispec": (9, 2, 3), "lookup": (7, 2, 2), "eagle2": (5, 1, 2)}
    measured = []

    def tune(answerer, method, benchmark, questions):
        measured.append((method, benchmark, len(questions)))
        answerer._models[method].set_tree(TreeShape(*trees[method]))
        return TreeShape(*trees[method]), [questions[0].question_id]

    monkeypatch.setattr(answerer.Answerer, "tune", tune)
    # of the two, coco_caption has questions that are not asked
    monkeypatch.setitem(BENCHMARKS, "coco_caption", replace(BENCHMARKS["coco_caption"], samples=2))
    some = ["--tree", "tune", "--question-end", "2", "--methods", "vispec", "lookup"]
    assert run_all.main(flags(data, tmp_path, *some)) == 0
    assert sorted(measured) == [("lookup", "coco_caption", 1), ("vispec", "coco_caption", 1)]
    assert run_all.main(flags(data, tmp_path, "--total-token", "-1")) == 0
    assert measured[2:] == [("eagle2", "coco_caption", 1)]
    for path in tmp_path.rglob("*.jsonl"):
        settings = meta(path)["settings"]
        tree = list(trees[settings["method"]]) if settings["method"] != "baseline" else None
        assert settings.get("tree") == settings.get("asked_tree") == tree
        assert len(read(path)) == (3 if settings["benchmark"] == "gqa" else 2)
        assert settings.get("tuned_on", {}).get("question_ids", [None])[0] not in ids(path)


def test_the_methods_take_turns_and_each_is_first(data, tmp_path, monkeypatch):
    turns = []
    answer = answerer.Answerer._answer

    def watched(self, ask):
        turns.extend((ask.question.question_id, method) for method in ask.methods)
        return answer(self, ask)

    monkeypatch.setattr(answerer.Answerer, "_answer", watched)
    run_all.main(flags(data, tmp_path, "--benchmarks", "gqa"))
    asked = list(dict.fromkeys(question for question, _ in turns))
    assert [question for question, _ in turns] == [question for question in asked for _ in METHODS]
    assert [method for _, method in turns[:: len(METHODS)]] == METHODS[:3]
    assert Counter(method for _, method in turns) == dict.fromkeys(METHODS, 3)


def test_goes_on_after_a_kill(finished, data, tmp_path, monkeypatch):
    """Stopped in the middle of a question, with one line cut off."""
    out = tmp_path / "answers"
    made = []
    choice = answerer.choice_of

    def stop(*args, **options):
        if len(made) == 6:
            raise KeyboardInterrupt
        made.append(args)
        return choice(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(answerer, "choice_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run_all.main(flags(data, out))
    torn = out / "gqa" / "baseline-temperature-0.0.jsonl"
    torn.write_text(torn.read_text()[:-20])
    monkeypatch.setattr(answerer, "choice_of", lambda *args, **kwargs: made.append(args) or choice(*args, **kwargs))
    assert run_all.main(flags(data, out)) == 0
    # the line that was cut off, and the question that was being answered: by all methods or by none
    assert len(made) == 2 * 3 * len(METHODS) + 1 + 6 % len(METHODS)
    for path in out.rglob("*.jsonl"):
        assert ids(path) == ids(finished / path.relative_to(out))
        assert [one["question_id"] for one in read(path)] == sorted(ids(path))


def test_dry_run_writes_and_loads_nothing(finished, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    shutil.copytree(finished / "gqa", tmp_path / "gqa")
    cut = tmp_path / "gqa" / "vispec-temperature-0.0.jsonl"
    cut.write_text(cut.read_text()[:-20])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run_all.main(flags(data, tmp_path, "--dry-run", "--benchmarks", "gqa", "mme", "coco_caption")) == 1
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    printed = capsys.readouterr()
    assert "gqa, temperature 0.0: 3 questions" in printed.out
    assert "baseline     3 of 3 answered" in printed.out and "vispec       2 of 3 answered" in printed.out
    assert "vispec       0 of 3 answered" in printed.out
    assert "not measured: mme: llava_mme.jsonl is missing, looked for in" in printed.err


def test_missing_data_is_a_hole_and_an_exit_code(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert run_all.main(flags(data, tmp_path, "--benchmarks", "mme", "gqa")) == 1
    printed = capsys.readouterr()
    assert printed.err.index("mme: llava_mme.jsonl is missing") < printed.err.index("error: not measured")
    assert "lossless: 3 of 3 questions" in printed.out and not (tmp_path / "mme").exists()


@pytest.mark.parametrize("reached", [True, False])
def test_what_is_not_under_the_data_root_comes_from_the_hub(data, tmp_path, monkeypatch, capsys, reached):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "gqa", tmp_path / "root" / "gqa")
    features = datasets.Features({"imgid": datasets.Value("int64"), "image": datasets.Image()})
    hub = datasets.Dataset.from_dict({"imgid": [7, 8], "image": [Image.new("L", (8, 8))] * 2}, features=features)
    if reached:
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    assert run_all.main(flags(tmp_path / "root", tmp_path / "out", "--dry-run")) == (0 if reached else 1)
    printed = capsys.readouterr()
    assert "gqa, temperature 0.0: 3 questions of" in printed.out
    if reached:
        assert "coco_caption, temperature 0.0: 2 questions of hub:HuggingFaceM4/COCO" in printed.out
        assert "root/coco, its questions are from hub:HuggingFaceM4/COCO" in printed.err
    else:
        assert "from https://cs.stanford.edu" in printed.err and "(here a folder coco under --data-root)" in printed.err
        assert "error: not measured, because their data cannot be read: coco_caption" in printed.err


def test_a_difference_fails(finished, data, tmp_path, capsys):
    shutil.copytree(finished / "gqa", tmp_path / "gqa")
    path = tmp_path / "gqa" / "lookup-temperature-0.0.jsonl"
    lines = read(path)
    lines[1]["choices"][0]["output_ids"][0][2] += 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_all.main(flags(data, tmp_path, "--benchmarks", "gqa")) == 1
    assert "the arms differ in float32" in capsys.readouterr().err


def test_a_difference_in_half_precision_is_looked_at_in_float32(data, tmp_path, capsys):
    few = ["--benchmarks", "gqa", "--methods", "lookup", "--question-end", "1", "--dtype", "bfloat16"]
    run_all.main(flags(data, tmp_path, *few))
    path = tmp_path / "gqa" / "baseline-temperature-0.0.jsonl"
    (line,) = read(path)
    line["choices"][0]["output_ids"][0][2] += 1
    path.write_text(json.dumps(line) + "\n")
    assert run_all.main(flags(data, tmp_path, *few)) == 0
    assert "again in float32: both arms give the same 6 output ids" in capsys.readouterr().out
    assert {found.name.split("-")[0] for found in path.parent.glob("*.jsonl")} == {"baseline", "lookup"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "medusa"], "--methods medusa: its draft head is missing, give --spec-model-path medusa=PATH"),
        (["--spec-model-path", "vispec=a", "vispec=b"], "--spec-model-path: found two heads of one method"),
        (["--spec-subfolder", "medusa=x"], "--spec-subfolder medusa=x: there is no --spec-model-path medusa=PATH"),
        (["--spec-revision", "vispec=a", "vispec=b"], "--spec-revision: found two values for vispec, expected one"),
        (["--spec-revision", "vispec=a"], "made with spec_revision None, found 'a'"),
        (["--methods", "generate", "--temperatures", "0", "1"], "--methods generate is greedy, found --temperatures"),
        (["--max-new-token", "7"], "made with max_new_tokens 6, found 7"),
        (["--question-begin", "500"], "--question-begin 500, --question-end .*: no question of gqa lies there, it has"),
    ],
)
def test_what_is_refused_before_loading(finished, data, monkeypatch, more, message):
    monkeypatch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
    with pytest.raises(ValueError, match=message):
        run_all.main(flags(data, finished, *more))


def test_a_head_without_its_method_gets_one_line(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_all.main(flags(data, tmp_path, "--spec-model-path", VISPEC))
    assert "expected METHOD=… with a method of vispec, eagle2, eagle3, msd, specvlm, medusa" in capsys.readouterr().err


def test_two_heads_of_a_method_and_transformers_generate(finished, data, tmp_path, capsys):
    """A label tells the heads apart, in files and tables; generate() is one more arm, without steps of ours."""
    shutil.copytree(finished / "gqa", tmp_path / "gqa")
    labelled = flags(data, tmp_path, "--spec-model-path", f"vispec={VISPEC}", f"vispec-again={VISPEC}")
    methods = ["--methods", "vispec", "generate", "--tree", "30/3/8", "--benchmarks", "gqa"]
    assert run_all.main([*labelled, *methods]) == 0
    names = [f"{name}-temperature-0.0.jsonl" for name in ("baseline", "vispec", "vispec-again", "generate")]
    found = [ids(tmp_path / "gqa" / name) for name in names]
    assert all(one == found[0] for one in found)
    choice = read(tmp_path / "gqa" / names[-1])[0]["choices"][0]
    assert not {"acceptance_length", "captured", "kernels"} & choice.keys()
    assert not {"tree", "layers"} & meta(tmp_path / "gqa" / names[-1])["settings"].keys()
    capsys.readouterr()
    assert speed.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "| ViSpec, again " in printed.out and "| transformers' generate " in printed.out
    assert "differ" not in printed.err


@pytest.mark.parametrize("head", ["vispec-=x", "vispec-../a=x", "other-a=x"])
def test_a_label_is_a_word(data, tmp_path, capsys, head):
    with pytest.raises(SystemExit):
        run_all.main(flags(data, tmp_path, "--spec-model-path", head))
    assert "expected" in capsys.readouterr().err


def test_an_eagle3_head(data, tmp_path, capsys):
    """A method that reads layers of the target runs beside one that does not, over the same target."""
    target = SpecModel.from_pretrained(TARGET).target.model
    save_draft(random_head(target, "eagle3", seed=1), tmp_path / "head")
    heads = ["--spec-model-path", f"eagle3={tmp_path / 'head'}", f"eagle2={EAGLE2}"]
    where = ["--base-model-path", TARGET, "--data-root", str(data), "--out", str(tmp_path / "out"), *heads]
    assert run_all.main([*where, "--benchmarks", "gqa", "--max-new-token", "6", "--question-end", "2"]) == 0
    assert "gqa by eagle3:" in capsys.readouterr().out
    found = [ids(tmp_path / "out" / "gqa" / f"{m}-temperature-0.0.jsonl") for m in ("baseline", "eagle3", "eagle2")]
    assert found[0] == found[1] == found[2]

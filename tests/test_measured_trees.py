"""`--tree tune` of the commands that answer benchmarks: on which questions, and what is kept of it."""

import json
from dataclasses import replace
from pathlib import Path

import benchmark_rows
import pytest
from benchmark_rows import write_coco

from vispec import SpecModel
from vispec.evaluation import answerer
from vispec.evaluation import gen_spec_answer_coco_caption as command
from vispec.evaluation.benchmarks import BENCHMARKS
from vispec.evaluation.settings import noted_tree
from vispec.model import tune
from vispec.model.shape import TreeShape

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, VISPEC = (str(FAMILY / name) for name in ("target", "draft_vispec"))
ASKED, IDS = 3, [70, 10, 50, 20, 40]


@pytest.fixture(autouse=True)
def _little_to_do(monkeypatch):
    """A benchmark that asks three of its questions, and few trees."""
    monkeypatch.setitem(BENCHMARKS, "coco_caption", replace(BENCHMARKS["coco_caption"], samples=ASKED))
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    monkeypatch.setattr(tune, "SHAPES", (TreeShape(2, 0, 1), TreeShape(8, 3, 4)))
    monkeypatch.setattr(tune, "REPETITIONS", 1)


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, IDS)
    return folder


def run(coco: Path, out: Path, *more: str) -> tuple[list, dict]:
    """The questions that are answered, and the settings of the file."""
    flags = ["--base-model-path", TARGET, "--spec-model-path", VISPEC, "--use-ours=True", "--data-folder", str(coco)]
    path = out / "answers.jsonl"
    command.main([*flags, "--answer-file", str(path), "--temperature", "0", "--max-new-token", "12", *more])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    meta = json.loads((out / "answers.jsonl.meta.json").read_text())
    return [line["question_id"] for line in lines], meta["settings"]


@pytest.mark.parametrize("tree", [["--total-token", "-1"], ["--tree", "tune"]])
def test_a_tree_is_measured_on_questions_that_are_never_asked(tree, coco, tmp_path, monkeypatch, capsys):
    _, settings = run(coco, tmp_path, *tree, "--question-end", "2")
    printed = capsys.readouterr().out
    assert "measured on 2 prompts" in printed and f"chosen: {noted_tree(settings['tree'])}," in printed
    tuned_on = settings["tuned_on"]
    assert (tuned_on["benchmark"], tuned_on["data"]) == ("coco_caption", str(coco))
    told = ", ".join(map(str, tuned_on["question_ids"]))
    assert f"measured on questions of coco_caption ({coco}) that are not reported: {told}\n" in printed
    monkeypatch.setattr(SpecModel, "tune", lambda *args: pytest.fail("a file keeps its tree"))
    answered, later = run(coco, tmp_path, *tree)
    assert later == settings and len(answered) == ASKED
    assert sorted(answered + tuned_on["question_ids"]) == sorted(IDS)


def test_where_all_questions_are_reported_another_benchmark_is_asked_for(coco, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "coco_caption", replace(BENCHMARKS["coco_caption"], samples=100))
    with monkeypatch.context() as patch:
        patch.setattr(answerer, "load_models", lambda *a: pytest.fail("the models were loaded"))
        for tune_on in ([], ["--tune-on", "coco_caption"], ["--tune-on", f"coco_caption={coco}"]):
            with pytest.raises(ValueError, match="^--tree tune: all questions of coco_caption are reported"):
                run(coco, tmp_path, "--tree", "tune", *tune_on)
    gqa = tmp_path / "gqa"
    gqa.mkdir()
    benchmark_rows.write_one("gqa", gqa)
    answered, settings = run(coco, tmp_path, "--tree", "tune", "--tune-on", f"gqa={gqa}")
    assert (settings["tuned_on"]["benchmark"], settings["tuned_on"]["data"]) == ("gqa", str(gqa))
    assert sorted(answered) == sorted(IDS) and len(settings["tuned_on"]["question_ids"]) == 1


def test_trees_are_measured_on_a_benchmark(coco, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(coco, tmp_path, "--tree", "tune", "--tune-on", "cifar")
    assert "--tune-on: expected one of sqa, " in capsys.readouterr().err


@pytest.mark.parametrize("tree", [["--total-token", "-1"], ["--tree", "tune"]])
def test_trees_are_measured_with_one_model(tree, coco, tmp_path):
    with pytest.raises(ValueError, match="--total-token -1 measures with one model: begin without --num-gpus-total"):
        run(coco, tmp_path, *tree, "--num-gpus-total", "2")

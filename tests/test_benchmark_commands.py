"""The command lines, over scenes in the benchmarks' layouts and with the recorded tiny models."""

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vispec.demo import make_benchmarks, multiple_choice
from vispec.demo.language import Question, answer
from vispec.demo.phrases import COUNT_OPENINGS, NUMBERS
from vispec.demo.questions import ask
from vispec.demo.scenes import COLOURS, SHAPES, SPLIT_SEEDS, Scene, render, scene_of
from vispec.evaluation import answerer
from vispec.evaluation.benchmarks import BENCHMARKS

FAMILY = Path(__file__).parent / "golden" / "llava_next"
TARGET, VISPEC = str(FAMILY / "target"), str(FAMILY / "draft_vispec")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    assert make_benchmarks.main(["--out", str(folder), "--count", "4"]) == 0
    return folder


def folder_of(made: Path, name: str) -> str:
    return str(made / Path(BENCHMARKS[name].folder).name)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_arms_answer(name, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    flags = ["--base-model-path", TARGET, "--data-folder", folder_of(made, name), "--answer-dir", str(tmp_path)]
    flags += ["--temperature", "0", "--max-new-token", "6", "--question-end", "2", "--bench-name", "b"]
    spec = ["--spec-model-path", VISPEC, "--use-ours=True", "--model-id", "ours"]
    for arm, more in (("baseline", ["--model-id", "plain"]), ("spec", spec)):
        command = importlib.import_module(f"vispec.evaluation.gen_{arm}_answer_{name}")
        assert command.main([*flags, *more]) == 0
    plain, ours = (
        [json.loads(line) for line in (tmp_path / "b" / f"{model}-temperature-0.0.jsonl").read_text().splitlines()]
        for model in ("plain", "ours")
    )
    assert [line["question_id"] for line in plain] == [line["question_id"] for line in ours] and len(ours) == 2
    assert all(len(line["choices"][0]["output_ids"][0]) == 6 for line in plain)
    assert {line["method"] for line in ours} == {"vispec"}
    assert "lossless: 2 of 2 questions (100.0 %)" in capsys.readouterr().out
    meta = json.loads((tmp_path / "b" / "ours-temperature-0.0.jsonl.meta.json").read_text())
    assert meta["settings"]["benchmark"] == name
    assert meta["lossless"] == {"baseline": "plain-temperature-0.0.jsonl", "questions": 2, "identical": 2}


def test_scienceqa_with_worked_examples(made, tmp_path, monkeypatch):
    monkeypatch.setattr(answerer, "WARM_UPS", 1)
    flags = ["--base-model-path", TARGET, "--data_root", folder_of(made, "sqa"), "--answer-file", str(tmp_path / "a")]
    flags += ["--temperature", "0", "--max-new-token", "3", "--question-end", "1", "--prompt_format", "QCM-A"]
    command = importlib.import_module("vispec.evaluation.gen_baseline_answer_sqa")
    assert command.main([*flags, "--shot_number", "1"]) == 0
    with pytest.raises(ValueError, match="was made with benchmark_options .*'shot_number': 1"):
        command.main(flags)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_made_questions_and_pictures(name, made):
    questions, _ = BENCHMARKS[name].questions(folder_of(made, name))
    assert len(questions) == len({question.question_id for question in questions}) == 4
    for question in questions:
        pictures = [item for item in question.turns[0].items if not isinstance(item, str)]
        assert [picture().size for picture in pictures] == [(96, 96)]
        assert all(question.turns[0].items[:-1])


def test_all_scenes_are_unseen_ones_and_each_is_used_once(monkeypatch, tmp_path):
    drawn = []
    for name, (_, scenes) in list(make_benchmarks.WRITERS.items()):
        monkeypatch.setitem(make_benchmarks.WRITERS, name, (lambda folder, used: drawn.extend(used), scenes))
    make_benchmarks.main(["--out", str(tmp_path), "--count", "30"])
    seeds = [scene.seed for scene in drawn]
    assert len(seeds) == len(set(seeds)) == 30 * 7 + 15 + 60
    assert all(seed in SPLIT_SEEDS["eval"] for seed in seeds)


def test_mme_asks_one_question_for_yes_and_one_for_no(made):
    rows = [json.loads(line) for line in (made / "MME" / "llava_mme.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for pair in (rows[:2], rows[2:]):
        assert pair[0]["question_id"] == pair[1]["question_id"]
        scene = scene_of("eval", int(Path(pair[0]["image"]).stem) - SPLIT_SEEDS["eval"].start)
        looks = {f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}" for thing in scene.things}
        assert sum(any(look in row["text"] for look in looks) for row in pair) == 1


def test_pictures_for_vizwiz_are_blurred(made):
    scene = scene_of("eval", make_benchmarks.FIRST_SCENE + 5 * make_benchmarks.SCENES_EACH)
    blurred = Image.open(made / "vizwiz" / "test" / "VizWiz_test_00000000.jpg")

    def steepest(picture: Image.Image) -> int:
        return np.abs(np.diff(np.asarray(picture.convert("L"), dtype=int))).max()

    assert steepest(blurred) < 0.8 * steepest(render(scene))


@pytest.mark.parametrize("kind", multiple_choice.KINDS)
def test_the_right_option_agrees_with_the_answer(kind):
    seen = set()
    for index in range(200):
        scene, rng = scene_of("eval", index), random.Random(index)
        question = ask(kind, scene, rng)
        options, right = multiple_choice.options(scene, question, rng)
        assert 2 <= len(options) == len(set(options)) <= 5
        assert _agrees(kind, options[right], answer(scene, question), scene, question)
        seen.add(right)
    assert len(seen) > 1


def _agrees(kind: str, option: str, text: str, scene: Scene, question: Question) -> bool:
    """Whether an option says what the beginning of the reference answer says."""
    if kind == "yesno":
        return text.lower().startswith(option)
    if kind == "sizes":
        openings = {"large ones": "Giants prevail", "small ones": "Dwarfs prevail", "equally many": "Giants and dwarfs"}
        return text.startswith(openings[option])
    if kind == "compare":
        opening, first, *_ = text.split(". ")
        names_first = first.lower().startswith(f"{option} houses")
        return (
            opening
            == {
                True: "The former is fuller",
                False: "The two are equally filled" if option.startswith("both") else "The latter is fuller",
            }[names_first]
        )
    if kind in ("count_shape", "count_colour"):
        return text.startswith(COUNT_OPENINGS[NUMBERS.index(option)][kind == "count_colour"])
    if option == "nothing":
        return scene.at(question.about[0]) is None
    return option in text.split(". ")[0]


def test_too_many_questions_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_benchmarks.main(["--out", str(tmp_path), "--count", "1501"])
    assert "--count 1501: expected at most 1500" in capsys.readouterr().err

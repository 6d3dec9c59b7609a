"""The loaders, over files written by hand: what is asked, in which order, and what a wrong file says."""

import importlib
import json
import re

import benchmark_rows as files
import datasets
import pytest
from PIL import Image

from vispec.evaluation.benchmarks import BENCHMARKS, Question
from vispec.evaluation.benchmarks.base import _distinct
from vispec.pictures import UnreadableImage

ROW_FILES = list(files.QUESTIONS)
EXPLAIN = "Please answer with an explanation."
SUFFIXES = dict.fromkeys(ROW_FILES, EXPLAIN) | {
    "textvqa": "Perform an OCR task on the provided image. Please extract the text accurately and provide a detailed "
    "explanation of the process. Ensure the response is comprehensive and well-structured."
}


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))


def shuffled(count: int) -> list[int]:
    """The first hundred numbers below `count`, in the order of datasets."""
    return datasets.Dataset.from_list([{"i": i} for i in range(count)]).shuffle(seed=42)["i"][:100]


def test_the_benchmarks_have_two_command_lines_each():
    eight = ["sqa", "mmvet", "textvqa", "mme", "coco_caption", "vizwiz", "gqa", "seed_bench"]
    assert list(BENCHMARKS) == [*eight, "mmspec"]
    for name in BENCHMARKS:
        for arm in ("baseline", "spec"):
            importlib.import_module(f"vispec.evaluation.gen_{arm}_answer_{name}").main  # noqa: B018


def test_pixel_limits_hold_in_all_but_coco():
    assert [name for name, benchmark in BENCHMARKS.items() if not benchmark.pixel_limits] == ["coco_caption"]


@pytest.mark.parametrize("name", ROW_FILES)
def test_a_hundred_rows_are_asked_in_shuffled_order(name, tmp_path, no_hub):
    files.write_rows(name, tmp_path, [files.row(name, i) for i in range(130)])
    order = shuffled(130)
    files.save_image(tmp_path / files.IMAGES[name].format(i=order[0]), size=(9, 5))
    questions, source = BENCHMARKS[name].questions(str(tmp_path))
    assert source == str(tmp_path.resolve())
    assert [question.question_id for question in questions] == [files.IDS[name](i) for i in order]
    for i, question in zip(order, questions, strict=True):
        (turn,) = question.turns
        text, suffix, _ = turn.items
        assert (turn.role, text, suffix) == ("user", files.QUESTIONS[name].format(i=i), SUFFIXES[name])
    assert questions[0].turns[0].items[2]().size == (9, 5)
    with pytest.raises(UnreadableImage):  # opened only now
        questions[1].turns[0].items[2]()


@pytest.mark.parametrize("name", ["gqa", "vizwiz"])
def test_the_others_are_those_that_are_not_asked(name, tmp_path):
    files.write_rows(name, tmp_path, [files.row(name, i) for i in range(130)])
    kinds = (BENCHMARKS[name].questions, BENCHMARKS[name].others)
    asked, others = ([question.question_id for question in kind(str(tmp_path))[0]] for kind in kinds)
    assert len(asked) == 100 and len(others) == 30
    assert {*asked, *others} == {files.IDS[name](i) for i in range(130)}


def test_questions_about_videos_are_left_out_before_shuffling(tmp_path):
    video = files.row("seed_bench", 0) | {"image": "SEED-Bench-video-image/0.png"}
    rows = [row for i in range(120) for row in (video, files.row("seed_bench", i))]
    files.write_rows("seed_bench", tmp_path, rows)
    questions, _ = BENCHMARKS["seed_bench"].questions(str(tmp_path))
    assert [question.question_id for question in questions] == [str(i) for i in shuffled(120)]


def test_questions_with_one_id_are_told_apart(tmp_path):
    second = files.row("mme", 0) | {"text": "Is there a road?"}
    files.write_rows("mme", tmp_path, [files.row("mme", 0), second, files.row("mme", 1)])
    questions, _ = BENCHMARKS["mme"].questions(str(tmp_path))
    assert sorted(question.question_id for question in questions) == ["color/0.jpg", "color/0.jpg#2", "color/1.jpg"]
    assert len({question.turns[0].items[0] for question in questions}) == 3


def test_a_number_that_is_an_id_of_the_data_is_not_given_again():
    questions = _distinct([Question(name, ()) for name in ("a", "a", "a#2", 1, "a")])
    assert [question.question_id for question in questions] == ["a", "a#3", "a#2", 1, "a#4"]


@pytest.mark.parametrize("found", [None, ["a"], True, 1.5])
def test_an_id_that_is_neither_number_nor_text_is_named(tmp_path, found):
    files.write_rows("gqa", tmp_path, [files.row("gqa", 0), files.row("gqa", 1) | {"question_id": found}])
    with pytest.raises(ValueError, match=r"gqa: .*, row 2: .*question_id is .*, expected a whole number or text"):
        BENCHMARKS["gqa"].questions(str(tmp_path))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_missing_file_is_named_with_its_place_and_source(name, tmp_path, no_hub):
    where = re.escape(str(tmp_path.resolve()))
    message = rf"^{name}: {re.escape(files.FILES[name])} is missing, looked for in {where} .*; get it from .*https://"
    with pytest.raises(ValueError, match=message):
        BENCHMARKS[name].questions(str(tmp_path))


FIELDS = {"textvqa": ("image_id", "question", "question_id"), "vizwiz": ("image", "question")}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in ROW_FILES for field in FIELDS.get(name, ("question_id", "image", "text"))],
)
def test_a_row_without_a_field_is_named(name, field, tmp_path):
    broken = files.row(name, 1)
    del broken[field]
    files.write_rows(name, tmp_path, [files.row(name, 0), broken])
    with pytest.raises(ValueError, match=rf"{name}: .*, row 2: expected the fields .*{field}.*KeyError\('{field}'\)"):
        BENCHMARKS[name].questions(str(tmp_path))


@pytest.mark.parametrize("name", ROW_FILES)
def test_a_row_that_is_no_object_or_has_no_text(name, tmp_path):
    field = "text" if "text" in files.row(name, 0) else "question"
    for broken in ("a line", None, files.row(name, 0) | {field: None}):
        files.write_rows(name, tmp_path, [broken])
        with pytest.raises(ValueError, match=rf"{name}: .*, row 1: expected the fields"):
            BENCHMARKS[name].questions(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gqa", '{"question_id": "1", "image": "a", "text": "b"}\n\n{"question_id', "line 3: not valid JSON"),
        ("vizwiz", '{"image": "a"}', "expected a list of rows in it"),
        ("textvqa", '{"rows": []}', "expected a list of rows under `data`"),
        ("textvqa", "{", "not valid JSON .*; get it again from"),
        ("seed_bench", "", "has no question of this benchmark"),
        ("mmvet", "[]", "is not as published"),
        ("mmvet", '{"v1_0": {"question": "x"}}', r"is not as published: .*KeyError\('imagename'\)"),
        ("sqa", "[]", r"problems\.json: expected an object"),
    ],
)
def test_a_file_that_is_not_as_published(name, text, message, tmp_path):
    (tmp_path / "pid_splits.json").write_text("{}")
    (tmp_path / files.FILES[name]).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        BENCHMARKS[name].questions(str(tmp_path))
    assert "\n" not in str(error.value)


def check_mmvet(folder: str | None) -> None:
    questions, _ = BENCHMARKS["mmvet"].questions(folder)
    assert [question.question_id for question in questions] == [f"v1_{i}" for i in range(120)]
    text, suffix, image = questions[3].turns[0].items
    assert (text, suffix) == ("what about 3?", EXPLAIN)
    assert image().size == (8, 6) and image().mode == "RGB"


def mmvet_table(id_name: str) -> datasets.Dataset:
    features = {id_name: datasets.Value("string"), "question": datasets.Value("string"), "image": datasets.Image()}
    rows = {
        id_name: [f"v1_{i}" for i in range(120)],
        "question": [f"what about {i}?" for i in range(120)],
        "image": [Image.new("L", (8, 6))] * 120,
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_mmvet_asks_all_of_the_published_file(tmp_path, no_hub):
    rows = {f"v1_{i}": {"imagename": f"picture {i}.png", "question": f"what about {i}?"} for i in range(120)}
    (tmp_path / "mm-vet.json").write_text(json.dumps(rows))
    files.save_image(tmp_path / "images" / "picture 3.png", size=(8, 6))
    check_mmvet(str(tmp_path))


@pytest.mark.parametrize("id_name", ["question_id", "id"])
def test_mmvet_from_the_hub(id_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = mmvet_table(id_name)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    check_mmvet(None)
    assert asked == [("whyu/mm-vet", "test")]


def test_mmvet_from_a_folder_of_the_hubs_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "copy" / "data").mkdir(parents=True)
    mmvet_table("question_id").to_parquet(tmp_path / "copy" / "data" / "test-00000-of-00001.parquet")
    check_mmvet(str(tmp_path / "copy"))


def test_mmvet_without_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = mmvet_table("id").remove_columns("question")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table)
    with pytest.raises(ValueError, match=r"whyu/mm-vet lacks the columns question, it has id, image"):
        BENCHMARKS["mmvet"].questions(None)

"""ScienceQA: which problems are asked, how they are put, worked examples, and where the pictures come from."""

import json
import random

import benchmark_rows as files
import datasets
import pytest
from PIL import Image

from vispec.evaluation import run_one
from vispec.evaluation.benchmarks import BENCHMARKS

SQA = BENCHMARKS["sqa"]
SUFFIX = 'Your answer should begin with "The answer is". Please answer with an explanation. Answer:'


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Problems 0 to 399, one in two of the test split, one in five without an image; no picture exists."""
    folder = tmp_path_factory.mktemp("scienceqa")
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    problems = {}
    for i in reversed(range(400)):
        split = "test" if i % 2 else ("train", "val")[i % 4 // 2]
        splits[split].append(str(i))
        problems[str(i)] = files.problem(image=None if i % 5 == 0 else "image.png", split=split, question=f"Why {i}?")
    files.write_scienceqa(folder, problems, splits)
    (folder / "images").mkdir()
    return folder


def with_image(split_rest: int, modulus: int) -> list[str]:
    return [str(i) for i in reversed(range(400)) if i % modulus == split_rest and i % 5]


def one(tmp_path, suffix: str = SUFFIX, captions: dict | None = None, changes: dict | None = None, **options):
    """The items of the only question."""
    files.write_scienceqa(tmp_path, {"7": files.problem(**(changes or {}))}, {"train": [], "test": ["7"]})
    (tmp_path / "images").mkdir(exist_ok=True)
    if captions is not None:
        (tmp_path / "captions.json").write_text(json.dumps({"captions": captions}))
    (question,), _ = SQA.questions(str(tmp_path), **options)
    (turn,) = question.turns
    return turn.items


def test_the_sample_is_the_published_one(many):
    questions, source = SQA.questions(str(many))
    random.seed(42)
    assert [question.question_id for question in questions] == random.sample(with_image(1, 2), 100)
    assert source == str(many.resolve())


def test_test_number_cuts_the_problems_with_an_image(many):
    questions, _ = SQA.questions(str(many), test_number=30)
    assert {question.question_id for question in questions} == set(with_image(1, 2)[:30])
    assert len(questions) == 30


def test_another_split(many):
    questions, _ = SQA.questions(str(many), test_split="val")
    assert {question.question_id for question in questions} <= set(with_image(2, 4))
    with pytest.raises(ValueError, match="--test_split 'dev': pid_splits.json has train, val, test"):
        SQA.questions(str(many), test_split="dev")


def test_question_and_suffix_are_one_text(tmp_path):
    text, image = one(tmp_path)
    assert text == (
        "Question: Which animal is a mammal?\nContext: Look at the picture.\nOptions: (A) a frog (B) a bat\n" + SUFFIX
    )
    assert callable(image)


@pytest.mark.parametrize(
    ("hint", "caption", "context"),
    [("", None, "N/A"), (None, None, "N/A"), ("", "A bat.", "A bat."), ("Look.", "A bat.", "Look. A bat.")],
)
def test_context(tmp_path, hint, caption, context):
    captions = None if caption is None else {"7": caption}
    text, _ = one(tmp_path, captions=captions, changes={"hint": hint}, use_caption=caption is not None)
    assert f"\nContext: {context}\n" in text


def test_a_caption_is_not_used_unasked(tmp_path):
    assert "A bat." not in one(tmp_path, captions={"7": "A bat."})[0]
    with pytest.raises(ValueError, match=r"captions\.json: expected an object with the key `captions`"):
        one(tmp_path)
        (tmp_path / "captions.json").write_text("{}")
        SQA.questions(str(tmp_path), use_caption=True)


def test_captions_from_another_file(tmp_path):
    one(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"captions": {"7": "A bat."}}))
    (question,), _ = SQA.questions(str(tmp_path), use_caption=True, caption_file=str(tmp_path / "other.json"))
    assert "Context: Look at the picture. A bat.\n" in question.turns[0].items[0]


@pytest.mark.parametrize(
    ("prompt_format", "lines"),
    [
        ("CQM-A", ["C", "Q", "M"]),
        ("QCML-A", ["Q", "C", "M", "BECAUSE: Mammals have fur."]),
        ("QCEM-A", ["Q", "C", "BECAUSE: A bat has fur.", "M"]),
        ("QCMLE-A", ["Q", "C", "M", "BECAUSE: Mammals have fur. A bat has fur."]),
        ("QCELM-A", ["Q", "C", "BECAUSE: A bat has fur. Mammals have fur.", "M"]),
    ],
)
def test_prompt_formats(tmp_path, prompt_format, lines):
    names = {
        "Q": "Question: Which animal is a mammal?",
        "C": "Context: Look at the picture.",
        "M": "Options: (A) a frog (B) a bat",
    }
    text, _ = one(tmp_path, prompt_format=prompt_format)
    assert text.removesuffix(SUFFIX).splitlines() == [names.get(line, line) for line in lines]


@pytest.mark.parametrize("prompt_format", ["QCM", "QC-A", "QCMX-A", "QCMM-A", "QCM-", "QCM-LE", "QCM-LAE", "qcm-a"])
def test_wrong_prompt_formats(tmp_path, prompt_format):
    with pytest.raises(ValueError, match=f"--prompt_format '{prompt_format}': expected .* such as QCM-ALE"):
        one(tmp_path, prompt_format=prompt_format)


def test_other_letters(tmp_path):
    assert "Options: (1) a frog (2) a bat\n" in one(tmp_path, options="123")[0]
    with pytest.raises(ValueError, match="--options A: problem 7 has 2 choices"):
        one(tmp_path, options="A")


def test_shots_come_next_from_the_same_stream(many):
    questions, _ = SQA.questions(str(many), shot_number=2)
    random.seed(42)
    asked = random.sample(with_image(1, 2), 100)
    shots = random.sample(with_image(0, 4), 2)
    assert [question.question_id for question in questions] == asked
    turns = questions[0].turns
    assert [turn.role for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    for name, turn in zip([*shots, asked[0]], turns[::2], strict=True):
        text, image = turn.items
        assert text.startswith(f"Question: Why {name}?\n") and text.endswith(SUFFIX) and callable(image)
    assert turns[1].items == ("The answer is B. BECAUSE: Mammals have fur. A bat has fur.",)


@pytest.mark.parametrize(
    ("prompt_format", "answer"),
    [
        ("QCM-A", "The answer is B."),
        ("QCM-AEL", "The answer is B. BECAUSE: A bat has fur. Mammals have fur."),
        ("QCM-LA", "Mammals have fur. The answer is B."),
        ("QCM-LEA", "Mammals have fur. A bat has fur. The answer is B."),
    ],
)
def test_answers_of_shots(many, prompt_format, answer):
    questions, _ = SQA.questions(str(many), shot_qids=["4", "8"], prompt_format=prompt_format)
    first, answered, second, *_ = questions[0].turns
    assert first.items[0].startswith("Question: Why 4?") and second.items[0].startswith("Question: Why 8?")
    assert answered.items == (answer,)


def test_wrong_shots(many):
    with pytest.raises(ValueError, match="--shot_qids: no train problem with an image: 20, 3"):
        SQA.questions(str(many), shot_qids=["3", "4", "20"])
    with pytest.raises(ValueError, match="--shot_number 99: there are 80 train problems with an image"):
        SQA.questions(str(many), shot_number=99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choices": None}, "problem 7: expected question, choices, hint"),
        ({"question": None}, "problem 7: expected question, choices, hint"),
    ],
)
def test_a_malformed_problem_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        one(tmp_path, changes=changes)


def test_a_problem_that_is_not_there_is_named(tmp_path):
    files.write_scienceqa(tmp_path, {"7": files.problem()}, {"test": ["7", "8"]})
    with pytest.raises(ValueError, match=r"problems\.json has no problem 8"):
        SQA.questions(str(tmp_path))


def test_pictures_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    problems = {name: files.problem() for name in ("1", "2")}
    files.write_scienceqa(tmp_path, problems, {"train": ["1"], "val": [], "test": ["2"]})
    files.save_image(tmp_path / "images" / "train" / "1" / "image.png", size=(5, 5))
    files.save_image(tmp_path / "images" / "test" / "2" / "image.png", size=(6, 6))
    (question,), _ = SQA.questions(str(tmp_path), shot_number=1)
    assert [turn.items[1]().size for turn in question.turns[::2]] == [(5, 5), (6, 6)]


def hub(sizes: list[int | None]) -> datasets.Dataset:
    images = [size and Image.new("L", (size, size)) for size in sizes]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def test_pictures_of_the_hub_are_rows_in_the_order_of_the_ids(tmp_path, monkeypatch):
    problems = {name: files.problem(image=None if name == "1" else "image.png") for name in "12345"}
    files.write_scienceqa(tmp_path, problems, {"train": ["3"], "val": ["5", "4"], "test": ["1", "2"]})
    rows = {"train": hub([30]), "validation": hub([50, 40]), "test": hub([None, 20])}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows[split])
    (question,), _ = SQA.questions(str(tmp_path), shot_number=1)
    assert [turn.items[1]().size for turn in question.turns[::2]] == [(30, 30), (20, 20)]
    assert question.turns[0].items[1]().mode == "RGB"
    assert sorted(asked) == [("derek-thomas/ScienceQA", "test"), ("derek-thomas/ScienceQA", "train")]
    validation, _ = SQA.questions(str(tmp_path), test_split="val")
    assert {q.question_id: q.turns[0].items[1]().size[0] for q in validation} == {"5": 50, "4": 40}


def test_a_hub_of_another_edition_is_refused(tmp_path, monkeypatch):
    files.write_scienceqa(tmp_path, {"2": files.problem()}, {"train": [], "val": [], "test": ["2"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub([20, 21]))
    with pytest.raises(ValueError, match=r"split test of derek-thomas/ScienceQA has 2 rows, pid_splits.json 1 ids"):
        SQA.questions(str(tmp_path))


def test_flags_have_the_published_defaults():
    parser = run_one.make_parser(SQA, "baseline")
    args = parser.parse_args(["--base-model-path", "x", "--data_root", "y"])
    assert args.data_folder == "y"
    assert (args.test_split, args.test_number, args.shot_number, args.prompt_format) == ("test", -1, 0, "QCM-ALE")
    assert (args.options, args.use_caption, args.shot_qids, args.caption_file) == ("ABCDE", False, None, None)
    flags = ["--base-model-path", "x", "--options", "A,B,C", "--shot_qids", "3", "4", "--use_caption"]
    args = parser.parse_args(flags)
    assert (args.options, args.shot_qids, args.use_caption) == ("ABC", ["3", "4"], True)
    assert {name: getattr(args, name) for name in SQA.options}.keys() == {
        "caption_file", "test_split", "test_number", "shot_number", "shot_qids", "prompt_format", "options",
        "use_caption",
    }  # fmt: skip

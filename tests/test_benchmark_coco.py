"""COCO's questions: its files, what a wrong one says, and the hub's rows."""

import datasets
import pytest
from PIL import Image

from vispec.evaluation.benchmarks import BENCHMARKS, first_shuffled


def test_missing_data_says_which_where_and_whence(tmp_path):
    with pytest.raises(ValueError, match=r"dataset_coco\.json is missing, looked for in .*; get it from https://"):
        BENCHMARKS["coco_caption"].questions(str(tmp_path))


def test_wrong_data_file(tmp_path):
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"file_name": "a.jpg"}]}')
    with pytest.raises(ValueError, match="is not Karpathy's file"):
        BENCHMARKS["coco_caption"].questions(str(tmp_path))
    (tmp_path / "dataset_coco.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        BENCHMARKS["coco_caption"].questions(str(tmp_path))


def test_hub_data_set_that_datasets_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(name, split):
        raise RuntimeError("Dataset scripts are no longer supported, but found COCO.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match="does not load HuggingFaceM4/COCO .*--data-folder"):
        BENCHMARKS["coco_caption"].questions(None)


def test_hub_rows_are_one_an_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = datasets.Features({"imgid": datasets.Value("int64"), "image": datasets.Image()})
    rows = {"imgid": [7, 7, 8, 9, 9], "image": [Image.new("L", (8, 8))] * 5}
    hub = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub)
    questions, source = BENCHMARKS["coco_caption"].questions(None)
    assert sorted(question.question_id for question in questions) == [7, 8, 9]
    assert source == "hub:HuggingFaceM4/COCO"
    text, image = questions[0].turns[0].items
    assert text == "Please provide a detailed description of the given image." and image().mode == "RGB"


@pytest.mark.parametrize("length", [3, 100, 257])
def test_order_is_that_of_datasets(length):
    rows = datasets.Dataset.from_list([{"id": i} for i in range(length)])
    assert first_shuffled(range(length), 100) == rows.shuffle(seed=42)["id"][:100]

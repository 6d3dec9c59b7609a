"""The benchmarks' files written by hand, with the fields of the published ones."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ONE_WORD = "Answer the question using a single word or phrase."

FILES = {
    "sqa": "problems.json",
    "mmvet": "mm-vet.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "mme": "llava_mme.jsonl",
    "coco_caption": "dataset_coco.json",
    "vizwiz": "test.json",
    "gqa": "llava_gqa_testdev_balanced.jsonl",
    "seed_bench": "llava-seed-bench.jsonl",
    "mmspec": "mmspec.jsonl",
}
"""The file that each benchmark reads first."""


def row(name: str, i: int) -> dict:
    """The i-th row of textvqa, mme, vizwiz, gqa or seed_bench."""
    return {
        "textvqa": {
            "image_id": f"0a{i}",
            "question": f"what is brand {i}?",
            "question_id": 34602 + i,
            "answers": ["x"],
        },
        "mme": {
            "question_id": f"color/{i}.jpg",
            "image": f"color/{i}.jpg",
            "text": f"Is car {i} red? Please answer yes or no.\n{ONE_WORD}",
            "category": "color",
        },
        "vizwiz": {"image": f"VizWiz_test_{i:08d}.v2.jpg", "question": f"What is can {i}?"},
        "gqa": {
            "question_id": f"20{i}",
            "image": f"n{i}.jpg",
            "text": f"Is it overcast {i}?\n{ONE_WORD}",
            "category": "default",
        },
        "seed_bench": {
            "question_id": str(i),
            "image": f"SEED-Bench-image/{i}_7",
            "text": f"How many towels has {i}?\nA. One\nB. Two\nAnswer with the option's letter.",
            "category": "Instances Counting",
        },
    }[name]


QUESTIONS = {
    "textvqa": "what is brand {i}?",
    "mme": "Is car {i} red? Please answer yes or no.",
    "vizwiz": "What is can {i}?",
    "gqa": "Is it overcast {i}?",
    "seed_bench": "How many towels has {i}?",
}
IDS = {
    "textvqa": lambda i: 34602 + i,
    "mme": lambda i: f"color/{i}.jpg",
    "vizwiz": lambda i: f"VizWiz_test_{i:08d}",
    "gqa": lambda i: f"20{i}",
    "seed_bench": str,
}
IMAGES = {
    "textvqa": "train_images/0a{i}.jpg",
    "mme": "MME_Benchmark_release_version/MME_Benchmark/color/{i}.jpg",
    "vizwiz": "test/VizWiz_test_{i:08d}.v2.jpg",
    "gqa": "images/n{i}.jpg",
    "seed_bench": "SEED-Bench-image/{i}_7",
}


def write_rows(name: str, folder: Path, rows: list) -> None:
    """The file of one of the five benchmarks of `row`."""
    path = folder / FILES[name]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps({"dataset_type": "val", "data": rows} if name == "textvqa" else rows))


def save_image(path: Path, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, format="PNG")


def problem(**changes) -> dict:
    """A problem of ScienceQA."""
    return {
        "question": "Which animal  is a mammal?",
        "choices": ["a frog", "a bat"],
        "answer": 1,
        "hint": "Look at the picture.",
        "image": "image.png",
        "task": "closed choice",
        "lecture": "Mammals have fur.",
        "solution": "A bat has fur.",
        "split": "test",
    } | changes


def write_scienceqa(folder: Path, problems: dict[str, dict], splits: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))


def write_coco(folder: Path, image_ids: Sequence[int], training: Sequence[int] = ()) -> None:
    """Images of different sizes, in their order; those of `training` are in that split."""
    (folder / "val2014").mkdir()
    rows = []
    for number, image_id in enumerate(image_ids):
        name = f"COCO_val2014_{image_id:012d}.jpg"
        Image.new("RGB", (40 + 4 * number, 48), (40 * number, 90, 160)).save(folder / "val2014" / name)
        split = "train" if image_id in training else "test"
        rows.append({"filepath": "val2014", "filename": name, "imgid": image_id, "split": split, "sentences": []})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))


def mmspec_row(number: int, *turns: str, **changes) -> dict:
    """An item of MMSpec."""
    image = f"mmspec_{number:03d}.jpg"
    return {"id": number, "image": image, "turns": turns, "category": "gqa", "topic": "general vqa"} | changes


def write_one(name: str, folder: Path) -> None:
    """A benchmark of a single question, with its picture."""
    if name in QUESTIONS:
        write_rows(name, folder, [row(name, 7)])
        save_image(folder / IMAGES[name].format(i=7))
    elif name == "sqa":
        write_scienceqa(folder, {"7": problem()}, {"train": [], "val": [], "test": ["7"]})
        save_image(folder / "images" / "test" / "7" / "image.png")
    elif name == "mmvet":
        rows = {"v1_0": {"imagename": "v1_0.png", "question": "What is x in the equation?", "capability": ["ocr"]}}
        (folder / "mm-vet.json").write_text(json.dumps(rows))
        save_image(folder / "images" / "v1_0.png")
    elif name == "mmspec":
        write_rows(name, folder, [mmspec_row(7, "What hangs on wall 7?", "Why?")])
        save_image(folder / "images" / "mmspec_007.jpg")
    else:
        rows = [{"filepath": "val2014", "filename": "COCO_val2014_7.jpg", "imgid": 7, "split": "test"}]
        (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": rows}))
        save_image(folder / "val2014" / "COCO_val2014_7.jpg")

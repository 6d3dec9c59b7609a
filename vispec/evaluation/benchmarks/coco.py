"""coco_caption: a caption for every test image of Karpathy's split."""

from pathlib import Path

from vispec.cli import UserError
from vispec.evaluation.benchmarks.base import (
    MALFORMED,
    Benchmark,
    Question,
    benchmark_image,
    hub_image,
    load_from_hub,
    read_json,
)
from vispec.prompts import ImageSource, user_turn

HUB = "HuggingFaceM4/COCO"
SOURCE = (
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip (dataset_coco.json), and the folder "
    "val2014 with the images from http://images.cocodataset.org/zips/val2014.zip"
)


def _load(folder: Path | None, suffix: str) -> list[Question]:
    """One question an image, in order of first appearance: the suffix alone, there is nothing else to ask."""
    images: dict[int, ImageSource] = {}
    for image_id, image in _hub_rows() if folder is None else _local_rows(folder):
        images.setdefault(image_id, image)
    return [Question(image_id, (user_turn(suffix, image),)) for image_id, image in images.items()]


def _local_rows(folder: Path) -> list[tuple[int, ImageSource]]:
    path = folder / "dataset_coco.json"
    data = read_json(path, "coco_caption", SOURCE)
    try:
        return [
            (row["imgid"], benchmark_image(folder / row.get("filepath", "") / row["filename"]))
            for row in data["images"]
            if row["split"] == "test"
        ]
    except MALFORMED as error:
        raise UserError(
            f"coco_caption: {path} is not Karpathy's file: expected images with filename, imgid, split ({error!r})"
        ) from None


def _hub_rows() -> list[tuple[int, ImageSource]]:
    data = load_from_hub("coco_caption", HUB, "test", SOURCE)
    return [(image_id, hub_image(data, row)) for row, image_id in enumerate(data["imgid"])]


COCO_CAPTION = Benchmark(
    name="coco_caption",
    load=_load,
    suffix="Please provide a detailed description of the given image.",
    folder="data/coco",
    source=SOURCE,
    hub=HUB,
    pixel_limits=False,
)

"""The benchmarks: what is asked, about which images, and where they come from. A benchmark is data plus a loader."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vispec.cli import UserError
from vispec.prompts import ImageSource, Turn, image_file, user_turn

SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Question:
    """One question; its images are opened when the prompt is built."""

    question_id: int | str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Benchmark:
    """A set of questions.

    A loader reads all rows of a folder, or of the hub where the folder is None, and returns their questions in the
    order of the data.
    """

    name: str
    load: Callable[[Path | None, str], list[Question]]
    """(folder or None, suffix) -> all questions."""
    suffix: str
    """Text item after the question."""
    folder: str
    """Where local files are looked for when no folder is given."""
    hub: str | None = None
    """Data set on the hub that serves when there is no local folder."""
    samples: int | None = 100
    """Questions that are asked: the first ones after shuffling; None asks all."""
    pixel_limits: bool = True
    """Whether Qwen's images are held within the limits of the training data."""

    def questions(self, folder: str | None) -> tuple[list[Question], str]:
        """The questions that are asked, and the folder or hub data set that they come from.

        Args:
            folder: local files; None takes the default folder if it exists, else the hub.

        Raises:
            UserError: a file is missing; it says which, where it was looked for and where to get it.
        """
        where = Path(folder) if folder else Path(self.folder)
        local = folder is not None or self.hub is None or where.is_dir()
        found = self.load(where if local else None, self.suffix)
        if not found:
            raise UserError(f"{self.name}: {where if local else self.hub} has no question of this benchmark")
        return first_shuffled(found, self.samples), str(where.resolve()) if local else f"hub:{self.hub}"


def first_shuffled(rows: Sequence[Any], count: int | None) -> list:
    """The first rows in the order that `datasets`' shuffle(seed=42) gives to as many rows."""
    import numpy as np

    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
    return [rows[i] for i in order[:count]]


def read_json(path: Path, benchmark: str, source: str) -> Any:
    """A data file of a benchmark; a missing or broken one is named, with the place where it can be had."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{benchmark}: {path.name} is missing, looked for in {path.parent.resolve()} (--data-folder); "
            f"get it from {source}"
        ) from None
    except ValueError as error:
        raise UserError(f"{benchmark}: {path} is no valid JSON ({error}); get it again from {source}") from None


COCO_SOURCE = (
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, and the folder val2014 with the "
    "images from http://images.cocodataset.org/zips/val2014.zip"
)


def _load_coco(folder: Path | None, suffix: str) -> list[Question]:
    """Karpathy's test split, one question an image, in order of first appearance."""
    if folder is None:
        rows = _coco_hub_rows()
    else:
        path = folder / "dataset_coco.json"
        data = read_json(path, "coco_caption", COCO_SOURCE)
        try:
            rows = [
                (row["imgid"], image_file(folder / row.get("filepath", "") / row["filename"]))
                for row in data["images"]
                if row["split"] == "test"
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"coco_caption: {path} is not Karpathy's file: expected images with filename, imgid, split ({error!r})"
            ) from None
    images: dict[int, ImageSource] = {}
    for image_id, image in rows:
        images.setdefault(image_id, image)
    return [Question(image_id, (user_turn(suffix, image),)) for image_id, image in images.items()]


def _coco_hub_rows() -> list[tuple[int, ImageSource]]:
    import datasets

    name = BENCHMARKS["coco_caption"].hub
    try:
        data = datasets.load_dataset(name, split="test")
    # a script data set is a RuntimeError since version 4 and a ValueError before, an unreachable hub a ConnectionError
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"coco_caption: datasets {datasets.__version__} does not load {name} from the hub ({reason}); give a local "
            f"copy by --data-folder, with dataset_coco.json and the image folders it names, from {COCO_SOURCE}"
        ) from None
    return [(image_id, partial(_hub_image, data, row)) for row, image_id in enumerate(data["imgid"])]


def _hub_image(data, row: int):
    return data[row]["image"].convert("RGB")


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="coco_caption",
            load=_load_coco,
            suffix="Please provide a detailed description of the given image.",
            folder="data/coco",
            hub="HuggingFaceM4/COCO",
            pixel_limits=False,
        ),
    )
}

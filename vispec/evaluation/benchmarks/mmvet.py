"""mmvet: all questions of MM-Vet, from the hub or from a local copy in one of two forms.

- As published: `mm-vet.json`, an object of {id: {imagename, question, …}}, with the pictures in `images/`.
- As on the hub: a folder with the parquet files of `whyu/mm-vet`, which `datasets` loads: columns question_id (or id),
  question, image, split "test".
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vispec.cli import UserError
from vispec.evaluation.benchmarks.base import (
    MALFORMED,
    Benchmark,
    Question,
    benchmark_image,
    hub_image,
    load_from_hub,
    read_json,
    text_of,
)
from vispec.prompts import EXPLAIN, user_turn

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "whyu/mm-vet"
SOURCE = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip (mm-vet.json, images)"


def _load(folder: Path | None, suffix: str) -> list[Question]:
    path = folder / "mm-vet.json" if folder else None
    if path is None:
        return _from_columns(load_from_hub("mmvet", HUB, "test", SOURCE), suffix, HUB)
    if not path.exists() and any(folder.rglob("*.parquet")):
        return _from_columns(load_from_hub("mmvet", str(folder), "test", SOURCE), suffix, str(folder))
    rows = read_json(path, "mmvet", SOURCE)
    try:
        return [
            Question(name, (user_turn(text_of(row, "question"), suffix, benchmark_image(folder / "images" / file)),))
            for name, row in rows.items()
            for file in [text_of(row, "imagename")]
        ]
    except MALFORMED as error:
        raise UserError(
            f"mmvet: {path} is not as published: expected {{id: {{imagename, question}}}} ({error!r})"
        ) from None


def _from_columns(data: "Dataset", suffix: str, where: str) -> list[Question]:
    name = "question_id" if "question_id" in data.column_names else "id"
    missing = [column for column in (name, "question", "image") if column not in data.column_names]
    if missing:
        raise UserError(f"mmvet: {where} lacks the columns {', '.join(missing)}, it has {', '.join(data.column_names)}")
    rows = zip(data[name], data["question"], strict=True)
    try:
        return [
            Question(question_id, (user_turn(question, suffix, hub_image(data, row)),))
            for row, (question_id, question) in enumerate(rows)
        ]
    except TypeError as error:
        raise UserError(f"mmvet: {where} is not as published: {error}") from None


MMVET = Benchmark(name="mmvet", load=_load, suffix=EXPLAIN, folder="data/mm-vet", source=SOURCE, hub=HUB, samples=None)

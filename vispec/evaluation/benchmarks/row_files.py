"""textvqa, mme, vizwiz, gqa, seed_bench: one file of rows, each a question about an image in a folder beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vispec.cli import UserError
from vispec.evaluation.benchmarks.base import (
    MALFORMED,
    Benchmark,
    Question,
    benchmark_image,
    read_json,
    read_json_lines,
    text_of,
)
from vispec.prompts import EXPLAIN, user_turn

LLAVA_FILES = "eval.zip of https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"


def _first_line(row: dict) -> str:
    """LLaVA's files have the question in the first line, and how to answer in the next ones."""
    return text_of(row, "text").split("\n")[0]


@dataclass(frozen=True)
class RowFile:
    """The layout of a benchmark's file; `load` is the benchmark's loader."""

    benchmark: str
    name: str
    fields: str
    """The fields that are read, for the message about a row that lacks one."""
    image: str
    """A row's picture, relative to the folder; {field} is filled in from the row."""
    source: str
    key: str | None = None
    """Where the rows are in a JSON object; None if the file is the list of rows."""
    question: Callable[[dict], str] = _first_line
    question_id: Callable[[dict], int | str] = lambda row: row["question_id"]
    keep: Callable[[dict], bool] = lambda row: True

    def benchmark_of(self, folder: str, suffix: str = EXPLAIN) -> Benchmark:
        """The benchmark whose file has this layout."""
        return Benchmark(self.benchmark, self.load, suffix, folder, self.source)

    def load(self, folder: Path, suffix: str) -> list[Question]:
        path = folder / self.name
        questions = []
        for number, row in enumerate(self._rows(path), start=1):
            try:
                if self.keep(row):
                    image = benchmark_image(folder / self.image.format_map(row))
                    turn = user_turn(self.question(row), suffix, image)
                    questions.append(Question(self.question_id(row), (turn,)))
            except MALFORMED as error:
                raise UserError(
                    f"{self.benchmark}: {path}, row {number}: expected the fields {self.fields} ({error!r})"
                ) from None
        return questions

    def _rows(self, path: Path) -> list:
        if path.suffix == ".jsonl":
            return read_json_lines(path, self.benchmark, self.source)
        data = read_json(path, self.benchmark, self.source)
        rows = data.get(self.key) if self.key and isinstance(data, dict) else data
        if not isinstance(rows, list):
            place = f"under `{self.key}`" if self.key else "in it"
            raise UserError(
                f"{self.benchmark}: {path}: expected a list of rows {place}; get it again from {self.source}"
            )
        return rows


TEXTVQA = RowFile(
    benchmark="textvqa",
    name="TextVQA_0.5.1_val.json",
    fields="image_id, question, question_id",
    image="train_images/{image_id}.jpg",
    source="https://textvqa.org/dataset (validation questions, and train_val_images.zip for the folder train_images)",
    key="data",
    question=lambda row: text_of(row, "question"),
).benchmark_of(
    "data/textvqa",
    "Perform an OCR task on the provided image. Please extract the text accurately and provide a detailed explanation "
    "of the process. Ensure the response is comprehensive and well-structured.",
)
MME = RowFile(
    benchmark="mme",
    name="llava_mme.jsonl",
    fields="question_id, image, text",
    image="MME_Benchmark_release_version/MME_Benchmark/{image}",
    source=f"{LLAVA_FILES}, and MME_Benchmark_release_version from "
    "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
).benchmark_of("data/MME")
VIZWIZ = RowFile(
    benchmark="vizwiz",
    name="test.json",
    fields="image, question",
    image="test/{image}",
    source="https://vizwiz.org/tasks-and-datasets/vqa (Annotations.zip, and test.zip for the folder test)",
    question=lambda row: text_of(row, "question"),
    question_id=lambda row: text_of(row, "image").split("/")[-1].split(".")[0],
).benchmark_of("data/vizwiz")
GQA = RowFile(
    benchmark="gqa",
    name="llava_gqa_testdev_balanced.jsonl",
    fields="question_id, image, text",
    image="images/{image}",
    source=f"{LLAVA_FILES}, and the folder images from https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
).benchmark_of("data/gqa")
SEED_BENCH = RowFile(
    benchmark="seed_bench",
    name="llava-seed-bench.jsonl",
    fields="question_id, image, text",
    image="{image}",
    source=f"{LLAVA_FILES}, and SEED-Bench-image from https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
    keep=lambda row: text_of(row, "image").startswith("SEED-Bench-image"),  # the others are frames of videos
).benchmark_of("data/seed_bench")

"""mmspec: MMSpec (arXiv 2603.14989), a benchmark of speculative decoding itself, by topics, with conversations.

A folder holds `mmspec.jsonl`, an item a line with id, image (a file in `images/`), turns (what the user asks, one text
a turn), category and topic. Where it has a folder `test` with these instead, as the published one has beside
`testmini`, that is read. Prompts are the authors': the picture, the first question, and nothing behind it.
"""

from collections.abc import Mapping
from pathlib import Path

from vispec.cli import UserError
from vispec.evaluation.benchmarks.base import (
    MALFORMED,
    Benchmark,
    Question,
    benchmark_image,
    read_json_lines,
    text_of,
)
from vispec.prompts import user_turn

SOURCE = "https://github.com/killthefullmoon/MMSpec (dataset/MMSpec: test, 600 items, or testmini, 60)"
TOPICS = (
    "general vqa", "text vqa", "image captioning", "chart understanding", "complex reasoning pro",
    "multi-turn conversation",
)  # fmt: skip
"""In the order of the published table; a release may name them otherwise, so others are taken too."""
LINE_FIELDS = ("question_id", "topic", "category", "answer_id", "model_id")
CHOICE_FIELDS = ("index", "turns", "idxs", "new_tokens", "wall_time")


def _load(folder: Path, suffix: str) -> list[Question]:
    test = folder / "test"
    path = (test if test.is_dir() and not (folder / "mmspec.jsonl").exists() else folder) / "mmspec.jsonl"
    questions = []
    for number, row in enumerate(read_json_lines(path, "mmspec", SOURCE), start=1):
        try:
            questions.append(_question(row, path.parent / "images"))
        except MALFORMED as error:
            raise UserError(
                f"mmspec: {path}, row {number}: expected the fields id, image, turns, category, topic ({error!r})"
            ) from None
    return questions


def _question(row: Mapping, images: Path) -> Question:
    image, labels = text_of(row, "image"), {name: text_of(row, name) for name in ("topic", "category")}
    texts = row["turns"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"turns is {texts!r}, expected a list of texts that is not empty")
    first, *further = texts
    turns = user_turn(benchmark_image(images / image), first)
    return Question(row["id"], (turns,), tuple(map(user_turn, further)), labels)


def _authors_row(line: Mapping) -> dict:
    """The line of an answer file as the authors' evaluation writes it.

    Of rounds only the numbers of accepted draft tokens are in it, those of all turns in one list.
    """
    choices = []
    for choice in line["choices"]:
        lengths = {"acceptance_length": choice["acceptance_length"]} if "acceptance_length" in choice else {}
        choices.append({name: choice[name] for name in CHOICE_FIELDS} | lengths)
    return {name: line[name] for name in LINE_FIELDS} | {"choices": choices, "tstamp": line["tstamp"]}


MMSPEC = Benchmark(
    name="mmspec",
    load=_load,
    suffix="",
    folder="data/MMSpec",
    source=SOURCE,
    samples=None,
    authors_row=_authors_row,
)

"""Write unseen scenes in the layouts of the benchmarks, with questions in each one's manner.

`python -m vispec.demo.make_benchmarks --out DIR --count N` makes, with N questions in each (MME: in pairs),

    DIR/scienceqa     sqa: multiple choice with a reason, and as many train problems for worked examples
    DIR/mm-vet        mmvet: open questions that take several skills
    DIR/textvqa       textvqa: the embedded target cannot read, so places, sizes and gaps are asked for
    DIR/MME           mme: two yes/no questions with a reason about each picture
    DIR/coco          coco_caption: captions
    DIR/vizwiz        vizwiz: blurred pictures
    DIR/gqa           gqa: relations
    DIR/seed_bench    seed_bench: counting, beside questions about a video, which the benchmark leaves out
    DIR/MMSpec        mmspec: its six topics in turn, the last one conversations of two turns

All scenes are of the split "eval", other ones in every benchmark. The questions are worded as the embedded target knows
them; what published files put into further lines of a question is there too.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from PIL import Image, ImageFilter
from tqdm import tqdm

from vispec.cli import Parser, count, run_cli
from vispec.demo import multiple_choice
from vispec.demo import phrases as ph
from vispec.demo.language import Question, answer
from vispec.demo.make_data import scene_window, write_coco
from vispec.demo.questions import ask, caption_question
from vispec.demo.scenes import Scene, render
from vispec.evaluation.benchmarks.mmspec import TOPICS
from vispec.files import write_atomic, write_json_atomic

FIRST_SCENE, SCENES_EACH = 70_000, 3_000
"""Where the benchmarks' scenes begin among the unseen ones, and how many each benchmark may have of them."""

BLUR = 1.0
"""Radius in pixels by which the pictures for vizwiz are blurred."""

ONE_WORD = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDE"


def write_scienceqa(folder: Path, scenes: list[Scene]) -> None:
    """The first half of the scenes become test problems, the others train problems."""
    problems, captions = {}, {}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, (scene, rng) in enumerate(_told("scienceqa", scenes), start=1):
        split = "test" if number <= len(scenes) // 2 else "train"
        question = ask(multiple_choice.KINDS[number % len(multiple_choice.KINDS)], scene, rng)
        choices, right = multiple_choice.options(scene, question, rng)
        splits[split].append(str(number))
        problems[str(number)] = {
            "question": question.text,
            "choices": choices,
            "answer": right,
            "hint": f"The picture shows {ph.GROUND_PHRASES[scene.ground]}." if number % 2 else "",
            "image": "image.png",
            "lecture": ph.SHAPE_FACTS[scene.things[0].shape],
            "solution": answer(scene, question),
            "split": split,
        }
        captions[str(number)] = answer(scene, caption_question())
        _save(render(scene), folder / "images" / split / str(number) / "image.png")
    write_json_atomic(folder / "problems.json", problems)
    write_json_atomic(folder / "pid_splits.json", splits)
    write_json_atomic(folder / "captions.json", {"captions": captions})


def write_mm_vet(folder: Path, scenes: list[Scene]) -> None:
    rows = {}
    for number, (scene, rng) in enumerate(_told("mm-vet", scenes)):
        question = _one_of(("mood", "path", "odd", "story", "draw", "describe", "compare"), number, scene, rng)
        name = f"v1_{number}.png"
        _save(render(scene), folder / "images" / name)
        rows[f"v1_{number}"] = {
            "imagename": name,
            "question": question.text,
            "answer": answer(scene, question),
            "capability": ["rec", "spat"],
        }
    write_json_atomic(folder / "mm-vet.json", rows)


def write_textvqa(folder: Path, scenes: list[Scene]) -> None:
    rows = []
    for number, (scene, rng) in enumerate(_told("textvqa", scenes)):
        question = _one_of(("place", "empty", "sizes"), number, scene, rng)
        name = f"{scene.seed:016x}"
        _save(render(scene), folder / "train_images" / f"{name}.jpg")
        rows.append(
            {
                "question": question.text,
                "image_id": name,
                "question_id": 34602 + number,
                "answers": [answer(scene, question)],
                "set_name": "val",
            }
        )
    write_json_atomic(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def write_mme(folder: Path, scenes: list[Scene]) -> None:
    """One question to be answered yes and one no about each picture, under one id as the published ones are."""
    rows = []
    for scene, rng in _told("MME", scenes):
        name = f"existence/{scene.seed}.png"
        _save(render(scene), folder / "MME_Benchmark_release_version" / "MME_Benchmark" / name)
        first, second = ask("yesno", scene, rng), ask("yesno", scene, rng)
        while _is_there(scene, second) == _is_there(scene, first):
            second = ask("yesno", scene, rng)
        rows += [_row(name, name, question, ONE_WORD, "existence") for question in (first, second)]
    _write_lines(folder / "llava_mme.jsonl", rows)


def write_vizwiz(folder: Path, scenes: list[Scene]) -> None:
    rows = []
    for number, (scene, rng) in enumerate(_told("vizwiz", scenes)):
        question = _one_of(("place", "describe", "count_colour", "odd"), number, scene, rng)
        name = f"VizWiz_test_{number:08d}.jpg"
        _save(render(scene).filter(ImageFilter.GaussianBlur(BLUR)), folder / "test" / name)
        rows.append({"image": name, "question": question.text})
    write_json_atomic(folder / "test.json", rows)


def write_gqa(folder: Path, scenes: list[Scene]) -> None:
    rows = []
    for number, (scene, rng) in enumerate(_told("gqa", scenes)):
        question = _one_of(("relation", "compare", "relation", "yesno"), number, scene, rng)
        name = f"n{scene.seed}.png"
        _save(render(scene), folder / "images" / name)
        rows.append(_row(f"20{scene.seed}", name, question, ONE_WORD, "default"))
    _write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)


def write_seed_bench(folder: Path, scenes: list[Scene]) -> None:
    rows = []
    for number, (scene, rng) in enumerate(_told("seed_bench", scenes)):
        question = _one_of(("count_shape", "count_colour"), number, scene, rng)
        choices, _ = multiple_choice.options(scene, question, rng)
        lines = [*(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)), ONE_LETTER]
        name = f"SEED-Bench-image/{scene.seed}.png"
        _save(render(scene), folder / name)
        rows.append(_row(str(number), name, question, "\n".join(lines), "Instances Counting"))
    video = _row(
        "v0", "SEED-Bench-video-image/Action_1.png", Question("describe", "What happens?"), ONE_LETTER, "Action"
    )
    _write_lines(folder / "llava-seed-bench.jsonl", [video, *rows])


MMSPEC_TOPICS = dict(
    zip(
        TOPICS,
        (("relation", "yesno"), ("place", "empty"), (), ("count_colour", "count_shape"), ("odd", "path"), ()),
        strict=True,
    )
)
"""By topic the kinds of questions; a caption where there are none."""


def write_mmspec(folder: Path, scenes: list[Scene]) -> None:
    rows = []
    for number, (scene, rng) in enumerate(_told("MMSpec", scenes)):
        topic = TOPICS[number % len(TOPICS)]
        kinds = MMSPEC_TOPICS[topic]
        asked = [_one_of(kinds, number // len(TOPICS), scene, rng) if kinds else caption_question()]
        if topic == TOPICS[-1]:
            asked.append(_one_of(("relation", "count_shape", "mood"), number // len(TOPICS), scene, rng))
        name = f"mmspec_{number + 1:03d}.png"
        _save(render(scene), folder / "test" / "images" / name)
        turns = [question.text for question in asked]
        rows.append({"id": number + 1, "image": name, "turns": turns, "category": asked[-1].kind, "topic": topic})
    _write_lines(folder / "test" / "mmspec.jsonl", rows)


Writer = Callable[[Path, list[Scene]], None]
WRITERS: dict[str, tuple[Writer, Callable[[int], int]]] = {
    "scienceqa": (write_scienceqa, lambda questions: 2 * questions),
    "mm-vet": (write_mm_vet, int),
    "textvqa": (write_textvqa, int),
    "MME": (write_mme, lambda questions: (questions + 1) // 2),
    "coco": (write_coco, int),
    "vizwiz": (write_vizwiz, int),
    "gqa": (write_gqa, int),
    "seed_bench": (write_seed_bench, int),
    "MMSpec": (write_mmspec, int),
}
"""By folder: what fills it, and how many scenes that takes for so many questions."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m vispec.demo.make_benchmarks", description="Write unseen scenes in the benchmarks' layouts."
    )
    parser.add_argument("--out", type=Path, required=True, help="where the folders go")
    parser.add_argument("--count", type=count, default=100, help="questions in each benchmark (default: 100)")
    args = parser.parse_args(argv)
    most = SCENES_EACH // 2
    if args.count > most:
        parser.error(f"--count {args.count}: expected at most {most}")
    for place, (name, (write, scenes)) in enumerate(WRITERS.items()):
        write(args.out / name, scene_window("eval", FIRST_SCENE + place * SCENES_EACH, scenes(args.count), seed=0))
    return 0


def _told(name: str, scenes: Iterable[Scene]) -> Iterator[tuple[Scene, random.Random]]:
    """The scenes of a benchmark, with what decides about their questions."""
    for scene in tqdm(scenes, desc=name, unit="image"):
        yield scene, random.Random(f"{name} {scene.seed}")


def _one_of(kinds: tuple[str, ...], number: int, scene: Scene, rng: random.Random) -> Question:
    return ask(kinds[number % len(kinds)], scene, rng)


def _is_there(scene: Scene, question: Question) -> bool:
    """Whether a yes/no question is to be answered yes."""
    return question.about in [(thing.colour, thing.shape) for thing in scene.things]


def _row(question_id: str, image: str, question: Question, further_lines: str, category: str) -> dict:
    """A row as LLaVA's files have them."""
    text = f"{question.text}\n{further_lines}"
    return {"question_id": question_id, "image": image, "text": text, "category": category}


def _write_lines(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(path, lambda file: file.write(text.encode()))


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


if __name__ == "__main__":
    run_cli(main)

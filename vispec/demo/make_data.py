"""Write scenes and texts in the layouts that data generation and the benchmarks read.

`python -m vispec.demo.make_data --out DIR --text N --images N --eval N` makes

    DIR/ShareGPT_V3/ShareGPT_V3_unfiltered_cleaned_split.json    text-only conversations
    DIR/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json               pictures with questions
    DIR/LLaVA-Pretrain/00000/000000000.png ...
    DIR/coco/dataset_coco.json, DIR/coco/val2014/*.png           unseen scenes, split "test"

Training files hold scenes of the split "draft", the coco folder those of the split "eval".
"""

import random
from pathlib import Path

from tqdm import tqdm

from vispec.cli import Parser, UserError, run_cli, whole
from vispec.demo.conversations import draw_question, text_turns
from vispec.demo.language import answer
from vispec.demo.questions import caption_question
from vispec.demo.scenes import SPLIT_SEEDS, Scene, render, scene_of
from vispec.files import write_json_atomic

TEXT_SCENES_FROM = 1_000_000
"""Text conversations use other scenes of the split than pictures do."""


def scene_window(split: str, first: int, count: int, seed: int) -> list[Scene]:
    """`count` scenes of a split; another seed gives others."""
    room = len(SPLIT_SEEDS[split]) - first
    if split == "draft" and first < TEXT_SCENES_FROM:
        room = TEXT_SCENES_FROM - first
    if count > room:
        raise UserError(f"asked for {count} scenes, the split {split!r} has room for {room}")
    return [scene_of(split, first + (seed * count + i) % room) for i in range(count)]


def write_sharegpt(folder: Path, scenes: list[Scene], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, scene in enumerate(scenes):
        turns = text_turns(scene, random.Random(f"text {seed} {i}"))
        pairs = [({"from": "human", "value": q}, {"from": "gpt", "value": a}) for q, a in turns]
        rows.append({"id": f"scene_{scene.seed}", "conversations": [m for p in pairs for m in p]})
    write_json_atomic(folder / "ShareGPT_V3_unfiltered_cleaned_split.json", rows)


def write_pretrain(folder: Path, scenes: list[Scene], seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, scene in enumerate(tqdm(scenes, desc="LLaVA-Pretrain", unit="image")):
        rng = random.Random(f"pretrain {seed} {i}")
        question = draw_question(scene, rng)
        name = f"{i // 1000:05d}/{i:09d}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        render(scene).save(folder / name)
        tagged = f"{question.text}\n<image>" if rng.random() < 0.5 else f"<image>\n{question.text}"
        rows.append(
            {
                "id": f"{i:09d}",
                "image": name,
                "conversations": [
                    {"from": "human", "value": tagged},
                    {"from": "gpt", "value": answer(scene, question)},
                ],
            }
        )
    write_json_atomic(folder / "blip_laion_cc_sbu_558k.json", rows)


def write_coco(folder: Path, scenes: list[Scene]) -> None:
    images = folder / "val2014"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, scene in enumerate(tqdm(scenes, desc="coco", unit="image")):
        name = f"COCO_val2014_{scene.seed:012d}.png"
        render(scene).save(images / name)
        rows.append(
            {
                "filepath": "val2014",
                "filename": name,
                "imgid": i,
                "cocoid": scene.seed,
                "split": "test",
                "sentences": [{"raw": answer(scene, caption_question())}],
            }
        )
    write_json_atomic(folder / "dataset_coco.json", {"dataset": "coco", "images": rows})


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.make_data", description="Write scenes as training and test data.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=whole, default=0, help="text-only conversations")
    parser.add_argument("--images", type=whole, default=0, help="pictures with a question")
    parser.add_argument("--eval", type=whole, default=0, help="unseen scenes in the coco layout")
    parser.add_argument("--seed", type=whole, default=0, help="another seed, other scenes")
    args = parser.parse_args(argv)
    if args.text:
        scenes = scene_window("draft", TEXT_SCENES_FROM, args.text, args.seed)
        write_sharegpt(args.out / "ShareGPT_V3", scenes, args.seed)
    if args.images:
        scenes = scene_window("draft", 0, args.images, args.seed)
        write_pretrain(args.out / "LLaVA-Pretrain", scenes, args.seed)
    if args.eval:
        write_coco(args.out / "coco", scene_window("eval", 0, args.eval, args.seed))
    return 0


if __name__ == "__main__":
    run_cli(main)

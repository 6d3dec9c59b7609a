"""A few rows in the layouts that data generation reads, and its commands on the recorded targets."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vispec.ge_data import (
    allocation_llava_pretrain_gen,
    allocation_llava_shargpt,
    allocation_qwen_pretrain_gen,
    allocation_qwen_shargpt,
)

GOLDEN = Path(__file__).parent / "golden"
TARGETS = {"llava": str(GOLDEN / "llava_next" / "target"), "qwen": str(GOLDEN / "qwen2_5_vl" / "target")}
CONFIGS = {
    "llava": str(GOLDEN / "llava_next" / "draft_vispec" / "config.json"),
    "qwen": str(GOLDEN / "qwen2_5_vl" / "draft_vispec" / "config.json"),
}
MAINS = {
    ("text", "llava"): allocation_llava_shargpt.main,
    ("text", "qwen"): allocation_qwen_shargpt.main,
    ("image", "llava"): allocation_llava_pretrain_gen.main,
    ("image", "qwen"): allocation_qwen_pretrain_gen.main,
}
QWEN_PIXELS = ["--min-pixels", "784", "--max-pixels", "7056"]


def write_rows(folder: Path, texts: int = 6, images: int = 6) -> Path:
    """Conversations of different lengths, and pictures of different sizes with questions."""
    folder.mkdir(parents=True, exist_ok=True)
    conversations = [
        {"id": f"t{i}", "conversations": [_turn("human", "what?" * (i % 4)), _turn("gpt", "a dog." * (1 + i % 3))]}
        for i in range(texts)
    ]
    (folder / "text.json").write_text(json.dumps(conversations))
    questions = []
    for i in range(images):
        pixels = np.random.default_rng(i).integers(0, 255, (30 + 20 * (i % 3), 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [_turn("human", "<image>\nname it" + "." * i), _turn("gpt", "unused")]
        questions.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    write_questions(folder, questions)
    return folder


def read_questions(folder: Path) -> list[dict]:
    return json.loads((folder / "blip_laion_cc_sbu_558k.json").read_text())


def write_questions(folder: Path, rows: list[dict]) -> None:
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))


def generate(stage: str, family: str, data: Path, out: Path, *more: str) -> int:
    """Run a data command in this process; returns its exit code."""
    arguments = ["--outdir", str(out), "--model", TARGETS[family], "--data-folder", str(data)]
    if stage == "image":
        arguments += ["--batch-size", "3", "--max-new-tokens", "12", *(QWEN_PIXELS if family == "qwen" else [])]
    return MAINS[stage, family]([*arguments, *more])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _turn(who: str, value: str) -> dict[str, str]:
    return {"from": who, "value": value}


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def turn(who, value="x"):
    return {"from": who, "value": value}

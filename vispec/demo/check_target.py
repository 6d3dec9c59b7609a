"""Has the target learned to see?

python -m vispec.demo.check_target [--model DIR]

On unseen scenes, greedily: precision and recall of the (colour, shape, place) triples that its captions claim, the
recall with the picture blanked, the length of its answers, and the share of answer tokens, over all kinds of question,
that prompt lookup predicts. The exit code is 3 when a threshold is missed.
"""

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from vispec.cli import Parser, UserError, count, run_cli
from vispec.demo.language import KINDS, answer
from vispec.demo.parse import parse
from vispec.demo.prompt_lookup import prompt_lookup_share
from vispec.demo.questions import ask, caption_question
from vispec.demo.scenes import IMAGE_SIZE, Scene, render, scene_of
from vispec.embedded import TARGET
from vispec.evaluation.loading import quiet_transformers
from vispec.prompts import EXPLAIN, chat_messages, user_turn

BLANK = (128, 128, 128)
MISSED = 3
"""Exit code of a target that misses a threshold; other codes than this and 0 are errors."""
MIN_PRECISION, MIN_RECALL, MAX_BLANK_RECALL, MAX_LOOKUP = 0.90, 0.90, 0.30, 1 / 3


@dataclass
class Reply:
    """One greedy answer: ids without prompt, padding and end token."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    ended: bool


def prompt_for(processor, image: Image.Image, question: str, *suffixes: str) -> str:
    """The chat prompt of the benchmarks: the question, the image, then the suffixes."""
    messages = chat_messages([user_turn(question, image, *suffixes)])
    return processor.apply_chat_template(messages, add_generation_prompt=True)


@torch.inference_mode()
def replies(
    model,
    processor,
    prompts: list[str],
    images: list[Image.Image],
    batch: int,
    max_new_tokens: int,
    name: str,
) -> list[Reply]:
    """Greedy answers in batches, padded on the left; `name` stands on the progress bar."""
    tokenizer, found = processor.tokenizer, []
    for first in tqdm(range(0, len(prompts), batch), desc=name, unit="batch"):
        part = slice(first, first + batch)
        inputs = processor(images=images[part], text=prompts[part], return_tensors="pt", padding=True)
        inputs = inputs.to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        width = inputs["input_ids"].shape[1]
        for row, mask in zip(output.tolist(), inputs["attention_mask"].tolist(), strict=True):
            prompt_ids = [token for token, real in zip(row[:width], mask, strict=True) if real]
            new = row[width:]
            ended = tokenizer.eos_token_id in new
            new = new[: new.index(tokenizer.eos_token_id)] if ended else new
            found.append(Reply(prompt_ids, new, tokenizer.decode(new).strip(), ended))
    return found


def precision_recall(texts: list[str], scenes: list[Scene]) -> tuple[float, float]:
    """Of all triples that the texts claim, and of all that the scenes hold, those that are in both."""
    right = claimed = present = 0
    for text, scene in zip(texts, scenes, strict=True):
        claims = parse(text)
        right += len(claims & scene.triples)
        claimed += len(claims)
        present += len(scene.triples)
    return right / max(1, claimed), right / present


def measure(model, processor, scene_count: int, batch: int, max_new_tokens: int) -> dict:
    """All figures; so many scenes for the captions, a tenth of them for each kind of question."""
    scenes = [scene_of("eval", i) for i in range(scene_count)]
    images = [render(scene) for scene in scenes]
    prompts = [prompt_for(processor, image, caption_question().text) for image in images]
    options = {"batch": batch, "max_new_tokens": max_new_tokens}
    captions = replies(model, processor, prompts, images, name="captions", **options)
    blanks = [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BLANK)] * scene_count
    blind = replies(model, processor, prompts, blanks, name="blanked", **options)

    rng = random.Random(0)
    tenth = max(1, scene_count // 10)
    asked = [(ask(kind, scenes[i], rng), scenes[i], images[i]) for kind in KINDS for i in range(tenth)]
    prompts = [prompt_for(processor, image, question.text, EXPLAIN) for question, _, image in asked]
    answers = replies(model, processor, prompts, [image for *_, image in asked], name="questions", **options)
    exact = [reply.text == answer(scene, question) for reply, (question, scene, _) in zip(answers, asked, strict=True)]
    precision, recall = precision_recall([reply.text for reply in captions], scenes)
    return {
        "scenes": scene_count,
        "precision": precision,
        "recall": recall,
        "blank_recall": precision_recall([reply.text for reply in blind], scenes)[1],
        "answers_as_reference": sum(exact) / len(exact),
        **text_figures(captions + answers),
    }


def text_figures(answered: list[Reply]) -> dict:
    """How long the answers are, and how much of them could be copied."""
    lengths = [len(reply.ids) for reply in answered]
    return {
        "prompt_lookup": prompt_lookup_share([(reply.prompt_ids, reply.ids) for reply in answered]),
        "tokens_min": min(lengths),
        "tokens_median": statistics.median(lengths),
        "tokens_max": max(lengths),
        "ended": sum(reply.ended for reply in answered) / len(answered),
    }


def verdicts(figures: dict) -> list[tuple[str, float, str, bool]]:
    """(what, value, what is asked, whether it holds) for everything that has a threshold."""
    precision, recall = figures["precision"], figures["recall"]
    blank, lookup = figures["blank_recall"], figures["prompt_lookup"]
    return [
        ("precision", precision, f">= {MIN_PRECISION:.2f}", precision >= MIN_PRECISION),
        ("recall", recall, f">= {MIN_RECALL:.2f}", recall >= MIN_RECALL),
        ("recall, blanked", blank, f"<  {MAX_BLANK_RECALL:.2f}", blank < MAX_BLANK_RECALL),
        ("prompt lookup", lookup, f"<  {MAX_LOOKUP:.2f}", lookup < MAX_LOOKUP),
    ]


def print_table(figures: dict) -> None:
    for what, value, asked, holds in verdicts(figures):
        print(f"{what:18s}{value:8.3f}   {asked}   {'ok' if holds else 'MISSED'}")
    lengths = f"{figures['tokens_min']} / {figures['tokens_median']:.0f} / {figures['tokens_max']}"
    print(
        f"answer tokens: {lengths} (min / median / max), {figures['ended']:.1%} ended; "
        f"{len(KINDS)} kinds of question, {figures['answers_as_reference']:.1%} word for word the reference"
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.check_target", description="Has the demo's target learned to see?")
    parser.add_argument("--model", type=Path, default=TARGET, help="the target's folder (default: the shipped one)")
    parser.add_argument("--scenes", type=count, default=200)
    parser.add_argument("--batch", type=count, default=20)
    parser.add_argument("--max-new-tokens", type=count, default=300)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").exists():
        raise UserError(f"--model {args.model}: no config.json there")
    quiet_transformers()
    model = AutoModelForImageTextToText.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    processor = AutoProcessor.from_pretrained(args.model)
    figures = measure(model.to(args.device).eval(), processor, args.scenes, args.batch, args.max_new_tokens)
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print_table(figures)
    return 0 if all(holds for *_, holds in verdicts(figures)) else MISSED


if __name__ == "__main__":
    run_cli(main)

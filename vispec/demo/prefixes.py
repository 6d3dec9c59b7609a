"""Time to the first token with and without kept prompts: the next turn of a conversation, and another question.

python -m vispec.demo.prefixes [--model DIR] [--pages 0 1 3] [--pictures 1]

A prompt shows pictures, has some pages of text, and asks. It is read first, which nobody times; then comes what a user
asks next, either behind the target's own answer or in a prompt of its own about the same pictures and pages. That one's
time to the first token counts, from the processor's outputs on: with a cache that holds the first prompt, and without
one. Both take turns, and medians of several repetitions count. A draft has no part in it: it reads prompts later.
"""

import random
from dataclasses import dataclass
from statistics import median

from vispec import embedded
from vispec.cli import Parser, count, provenance, run_cli, whole
from vispec.evaluation.loading import dtype_name, load_model, quiet_transformers
from vispec.evaluation.measure import Generation, answer_question
from vispec.files import write_json_atomic
from vispec.timing import now, turns

PAGES, REPETITIONS = (0, 1, 3), 7
PAGE_WORDS = 300
FIRST, NEXT = "What do you see in this picture?", "What mood do the colours create?"
ANSWER_TOKENS = 60
"""Of the answer that stands before the next turn, at most."""


@dataclass(frozen=True)
class Row:
    """What a user asks next behind one prompt."""

    asked: str
    pages: int
    tokens: int
    """Of the prompt that is timed."""
    reused: int
    whole: float
    """Seconds to the first token where all is read."""
    read_on: float
    """The same with a cache."""
    same_token: bool


def measure(model, first: dict, following: dict, repetitions: int) -> tuple[int, dict[bool, float], bool]:
    """Tokens that are reused, median seconds without and with a cache, and whether the first token is the same.

    Args:
        first, following: what the processor returned for the two prompts.
    """
    from vispec.model.prefixes import PrefixCache

    target, kept, reused, tokens = model.target, PrefixCache(10**9), set(), set()
    batch = model.open_batch(1, max(one["input_ids"].shape[1] for one in (first, following)) + 1, False)

    def read(inputs: dict) -> float:
        joining = batch.prepare(**inputs, max_new_tokens=1)
        start = now(model.device)
        _, told = batch.join(joining)
        seconds = now(model.device) - start
        if inputs is following:
            reused.add(told.reused)
            tokens.update(told.tokens)
        return seconds

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repetition, _, keeps in turns([False, True], 1, repetitions + 1):
        target.prefixes = kept if keeps else None
        kept.clear()
        read(first)
        found = read(following)
        if repetition:  # the first one warms up, and sees whether the target reads on
            seconds[keeps].append(found)
    target.prefixes = None
    batch.close()
    return max(reused), {keeps: median(found) for keeps, found in seconds.items()}, len(tokens) == 1


def page(number: int) -> str:
    """Descriptions of unseen scenes."""
    from vispec.demo.language import answer
    from vispec.demo.questions import ask
    from vispec.demo.scenes import scene_of

    words, index = [], 1000 * (number + 1)
    while len(words) < PAGE_WORDS:
        scene, index = scene_of("eval", index), index + 1
        words += answer(scene, ask("describe", scene, random.Random(index))).split()
    return " ".join(words[:PAGE_WORDS])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m vispec.demo.prefixes", description="Time to the first token behind kept prompts.")
    add = parser.add_argument
    add("--model", default=str(embedded.TARGET), help="a target: a folder or a hub id (default: the embedded one)")
    add("--pages", nargs="+", type=whole, default=PAGES, metavar="N",
        help=f"of {PAGE_WORDS} words, before the question (default: {' '.join(map(str, PAGES))})")  # fmt: skip
    add("--pictures", type=count, default=1, help="before them (default: %(default)s)")
    add("--repetitions", type=count, default=REPETITIONS, help="(default: %(default)s)")
    add("--json", metavar="FILE", help="write the rows and what made them")
    parser.add_hardware(embedded.DTYPE)
    args = parser.parse_args(argv)
    from vispec.demo.runner import questions
    from vispec.prompts import Turn, build_inputs, load_processor, user_turn
    from vispec.text import answer_text

    quiet_transformers()
    model = load_model(args.model, None, dtype=args.dtype, device_map=args.device_map)
    processor, images = load_processor(args.model), [asked.image for asked in questions(args.pictures)]
    rows = []
    for pages in args.pages:
        shown = (*images, *map(page, range(pages)))
        opening = user_turn(*shown, FIRST)
        first = build_inputs(processor, [opening])
        said = answer_question(model, first, "baseline", Generation(0.0, ANSWER_TOKENS)).output_ids
        answered = Turn("assistant", (answer_text(processor.tokenizer, said),))
        for asked, talk in (
            ("the next turn", [opening, answered, user_turn(NEXT)]),
            ("another question", [user_turn(*shown, NEXT)]),
        ):
            following = build_inputs(processor, talk)
            reused, seconds, same = measure(model, first, following, args.repetitions)
            length = following["input_ids"].shape[1]
            rows.append(Row(asked, pages, length, reused, seconds[False], seconds[True], same))
    columns = "asked", "pages", "tokens", "reused", "ms without", "ms with", "without / with", "first token the same"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        times = f"{1e3 * row.whole:.1f} | {1e3 * row.read_on:.1f} | {row.whole / row.read_on:.1f}"
        same = "yes" if row.same_token else "no"
        print(f"| {row.asked} | {row.pages} | {row.tokens} | {row.reused} | {times} | {same} |")
    print(f"medians of {args.repetitions}, {dtype_name(model)}")
    if args.json:
        write_json_atomic(args.json, {"rows": [vars(row) for row in rows], "provenance": provenance(args)})
    return 0


if __name__ == "__main__":
    run_cli(main)

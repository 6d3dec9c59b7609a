"""The demo's run: the shipped VLM answers questions about unseen scenes, all arms in turn."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

from vispec.demo.questions import ask
from vispec.demo.scenes import render, scene_of
from vispec.evaluation.comparison import Comparison, compare
from vispec.evaluation.loading import load_model
from vispec.evaluation.measure import Answer, Arm, Generation, Kind, drafted_flags, interleave, typical
from vispec.model.shape import TreeShape
from vispec.prompts import build_inputs, user_turn
from vispec.text import pieces_of

FIRST_SCENE = 60_000
"""Index into the unseen scenes; other checks use the first ones."""

KINDS = (
    "describe", "relation", "count_colour", "place", "mood", "path",
    "odd", "compare", "story", "yesno", "sizes", "draw", "empty", "count_shape",
)  # fmt: skip
"""Kinds of questions, in the order in which they are asked."""

MAX_NEW_TOKENS = 300
ARMS: tuple[Kind, ...] = ("baseline", "spec", "generate")


@dataclass(frozen=True)
class Asked:
    """A question about a rendered scene that neither training nor data generation has seen."""

    scene_seed: int
    image: Image.Image
    text: str


@dataclass(frozen=True)
class Reply:
    """All arms' answers to a question, once for every repetition."""

    question: Asked
    answers: Mapping[Kind, list[Answer]]
    pieces: list[tuple[str, bool]]
    """ViSpec's answer as (text, drafted)."""

    def measured(self, arm: Kind) -> Answer:
        """An arm's answer with the median times of its repetitions."""
        return typical(self.answers[arm])


@dataclass(frozen=True)
class Result:
    """What a run in one dtype brought."""

    dtype: str
    replies: list[Reply]
    repetitions: int
    comparison: Comparison
    """ViSpec beside our own plain loop."""
    over_generate: Comparison
    """ViSpec beside transformers' generate() on the same target."""


def questions(count: int, first: int = 0) -> list[Asked]:
    """`count` of the demo's questions, from the `first` one on; always the same."""
    return [_question(index) for index in range(first, first + count)]


def run(
    target: str,
    draft: str,
    tree: TreeShape,
    dtype: str,
    processor,
    asked: list[Asked],
    repetitions: int,
    budget: float,
    on_reply: Callable[[int, Reply], None] | None = None,
) -> Result:
    """Answer all questions by all arms, in turn question by question, greedily.

    Args:
        repetitions: at most this many; the medians of their times count.
        budget: seconds for all of them, see `turns`.
        on_reply: called after each question of the first repetition.
    """
    model = load_model(target, draft, dtype=dtype, method="vispec", tree=tree)
    inputs = [build_inputs(processor, [user_turn(question.text, question.image)]) for question in asked]
    generation = Generation(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)

    def reply(index: int, answers: Mapping[Kind, list[Answer]]) -> Reply:
        spec = answers["spec"][0]
        return Reply(asked[index], answers, pieces_of(processor.tokenizer, spec.output_ids, drafted_flags(spec)))

    def on_prompt(repetition: int, index: int, answers: Mapping[Kind, Answer]) -> None:
        if repetition == 0 and on_reply is not None:
            on_reply(index, reply(index, {arm: [answer] for arm, answer in answers.items()}))

    arms = [Arm(kind, model, kind) for kind in ARMS]
    found = interleave(arms, inputs, generation, repetitions, budget=budget, on_prompt=on_prompt)
    replies = [reply(index, {arm: answers[index] for arm, answers in found.items()}) for index in range(len(asked))]
    return Result(dtype, replies, len(found["spec"][0]), _beside(replies, "baseline"), _beside(replies, "generate"))


def one_reply(reply: Reply) -> Comparison:
    """ViSpec beside plain decoding on a single question."""
    return _beside([reply], "baseline")


def _beside(replies: list[Reply], other: Kind) -> Comparison:
    """ViSpec beside another arm."""
    return compare(*([[reply.measured(arm)] for reply in replies] for arm in (other, "spec")))


def _question(index: int) -> Asked:
    scene = scene_of("eval", FIRST_SCENE + index)
    question = ask(KINDS[index % len(KINDS)], scene, random.Random(f"demo {scene.seed}"))
    return Asked(scene.seed, render(scene), question.text)

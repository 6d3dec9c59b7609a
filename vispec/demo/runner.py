"""The demo's run: the shipped VLM answers questions about unseen scenes, both arms in turn."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median

from PIL import Image

from vispec.demo.questions import ask
from vispec.demo.scenes import render, scene_of
from vispec.evaluation.comparison import Comparison, compare
from vispec.evaluation.loading import load_model
from vispec.evaluation.measure import Answer, Arm, Generation, answer_question, drafted_flags
from vispec.evaluation.text import pieces_of
from vispec.prompts import build_inputs, user_turn

FIRST_SCENE = 60_000
"""Index into the unseen scenes; other checks use the first ones."""

KINDS = (
    "describe", "relation", "count_colour", "place", "mood", "path",
    "odd", "compare", "story", "yesno", "sizes", "draw", "empty", "count_shape",
)  # fmt: skip
"""Kinds of questions, in the order in which they are asked."""

MAX_NEW_TOKENS = 300
WARM_UP_TOKENS = 16
ARMS: tuple[Arm, ...] = ("baseline", "spec")


@dataclass(frozen=True)
class Asked:
    """A question about a rendered scene that neither training nor data generation has seen."""

    scene_seed: int
    image: Image.Image
    text: str


@dataclass
class Reply:
    """Both arms' answers to a question, once for every repetition."""

    question: Asked
    answers: dict[Arm, list[Answer]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    """ViSpec's answer as (text, drafted)."""

    def measured(self, arm: Arm) -> Answer:
        """An arm's answer with the median times of its repetitions."""
        answers = self.answers[arm]
        return replace(
            answers[0],
            wall_time=median(answer.wall_time for answer in answers),
            decode_time=median(answer.decode_time for answer in answers),
        )


@dataclass
class Result:
    """What a run in one dtype brought."""

    dtype: str
    replies: list[Reply]
    repetitions: int
    comparison: Comparison


def questions(count: int) -> list[Asked]:
    """The demo's questions, always the same."""
    return [_question(index) for index in range(count)]


def run(
    target: str,
    draft: str,
    tree: dict[str, int],
    dtype: str,
    processor,
    asked: list[Asked],
    repetitions: int,
    budget: float,
    on_reply: Callable[[int, Reply], None] | None = None,
) -> Result:
    """Answer all questions by both arms, in turn question by question, greedily.

    Args:
        repetitions: at most this many; the medians of their times count.
        budget: seconds; no repetition that would probably end later is begun, the first one always runs.
        on_reply: called after each question of the first repetition.
    """
    model = load_model(target, draft, dtype=dtype, method="vispec", **tree)
    inputs = [build_inputs(processor, [user_turn(question.text, question.image)]) for question in asked]
    generation = Generation(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    for arm in ARMS:
        answer_question(model, inputs[0], arm, replace(generation, max_new_tokens=WARM_UP_TOKENS))
    replies = [Reply(question) for question in asked]
    done = 0
    for done in _repetitions(repetitions, budget):
        for index, reply in enumerate(replies):
            for arm in ARMS:
                reply.answers[arm].append(answer_question(model, inputs[index], arm, generation))
            if done == 1:
                spec = reply.answers["spec"][0]
                reply.pieces = pieces_of(processor.tokenizer, spec.output_ids, drafted_flags(spec))
                if on_reply is not None:
                    on_reply(index, reply)
    measured = [{i: [reply.measured(arm)] for i, reply in enumerate(replies)} for arm in ARMS]
    return Result(dtype, replies, done, compare(*measured))


def one_reply(reply: Reply) -> Comparison:
    """The arms compared on a single question."""
    return compare(*({0: [reply.measured(arm)]} for arm in ARMS))


def _question(index: int) -> Asked:
    scene = scene_of("eval", FIRST_SCENE + index)
    question = ask(KINDS[index % len(KINDS)], scene, random.Random(f"demo {scene.seed}"))
    return Asked(scene.seed, render(scene), question.text)


def _repetitions(most: int, budget: float) -> Iterator[int]:
    """1, 2, … as long as another one probably ends within the budget of seconds."""
    start = time.perf_counter()
    for number in range(1, most + 1):
        yield number
        spent = time.perf_counter() - start
        if spent + spent / number > budget:
            return

"""Options for questions about scenes, with the right one among them."""

import random

from vispec.demo.language import COLUMNS, ROWS, Question, odd_one
from vispec.demo.phrases import NUMBERS
from vispec.demo.scenes import COLOURS, SHAPES, Scene, Thing

KINDS = ("count_shape", "count_colour", "yesno", "place", "compare", "sizes", "odd")
"""Kinds of questions that `options` knows."""
MOST = 5
"""Options of a question at most, one for each of the letters A to E."""


def options(scene: Scene, question: Question, rng: random.Random) -> tuple[list[str], int]:
    """What can be chosen from, and the index of the right choice; of things that look the same only one is offered."""
    right, others = _right_and_others(scene, question)
    chosen = [*rng.sample(others, min(MOST - 1, len(others))), right]
    rng.shuffle(chosen)
    return chosen, chosen.index(right)


def _right_and_others(scene: Scene, question: Question) -> tuple[str, list[str]]:
    kind, things = question.kind, scene.things
    if kind in ("count_shape", "count_colour"):
        looks = [thing.shape if kind == "count_shape" else thing.colour for thing in things]
        return _split(NUMBERS[looks.count(question.about[0])], NUMBERS[: len(things) + 1])
    if kind == "yesno":
        here = question.about in [(thing.colour, thing.shape) for thing in things]
        return ("yes", ["no"]) if here else ("no", ["yes"])
    if kind == "place":
        thing = scene.at(question.about[0])
        return _split(_look(thing) if thing else "nothing", ["nothing", *map(_look, things)])
    if kind == "compare":
        by_column, *lines = question.about
        counts = [sum((t.column if by_column else t.row) == line for t in things) for line in lines]
        names = [f"the {(COLUMNS if by_column else ROWS)[line]}" for line in lines]
        return _more(*counts, *names, "both are equally full")
    if kind == "sizes":
        large = sum(thing.large for thing in things)
        return _more(large, len(things) - large, "large ones", "small ones", "equally many")
    if kind == "odd":
        return _split(_look(odd_one(scene)[0]), ["none of them", *map(_look, things)])
    raise ValueError(f"expected a question of one of the kinds {', '.join(KINDS)}, found {kind}")


def _look(thing: Thing) -> str:
    return f"{COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def _split(right: str, all_of_them) -> tuple[str, list[str]]:
    return right, sorted(set(all_of_them) - {right})


def _more(first: int, second: int, if_first: str, if_second: str, if_equal: str) -> tuple[str, list[str]]:
    return _split(
        if_first if first > second else if_second if second > first else if_equal, [if_first, if_second, if_equal]
    )

"""The parser of claims, on answers written by hand."""

import random

import pytest

from vispec.demo.language import answer
from vispec.demo.parse import parse
from vispec.demo.phrases import PLACES
from vispec.demo.questions import ask
from vispec.demo.scenes import scene_of

CASES = {
    "object before place": ("A small red heart sits in the top left corner, sweet as candy.", {("red", "heart", 0)}),
    "place before object": ("Down at the bottom edge glows a huge blue star.", {("blue", "star", 7)}),
    "grid style, line break inside": ("Row two, column\nthree shows a wide green ring.", set()),
    "grid style": ("Row two, column three shows a wide green ring.", {("green", "ring", 5)}),
    "compass, longest name wins": (
        "A black cross guards the northwest side. A pink circle guards the north side.",
        {("black", "cross", 0), ("pink", "circle", 1)},
    ),
    "two objects before their places": (
        "A red circle at the upper left, a blue square at the dead centre.",
        {("red", "circle", 0), ("blue", "square", 4)},
    ),
    "two objects behind their places": (
        "The west holds a red circle and the east a blue square.",
        {("red", "circle", 3), ("blue", "square", 5)},
    ),
    "a reference without colour claims nothing": (
        "A tall pink triangle fills the upper right, just above the ring.",
        {("pink", "triangle", 2)},
    ),
    "an object without a place": ("There is a purple diamond somewhere.", set()),
    "a place without an object": ("The top left corner is deserted.", set()),
    "a place does not reach into the next sentence": ("We see a purple diamond. The top edge is free.", set()),
    "words that only look alike": ("The northern lights are a reddish hearth in the top hat.", set()),
    "plural is no single object": ("Two red hearts fill the upper left.", set()),
    "colour and shape apart": ("A red and rather large heart lies in the upper left.", set()),
    "contradiction: both are claimed": (
        "A red heart is at the left edge. A blue heart is at the left edge.",
        {("red", "heart", 3), ("blue", "heart", 3)},
    ),
    "cut off in the middle": ("A red heart is at the left edge. A blue star is at the top", {("red", "heart", 3)}),
    "empty": ("", set()),
}


@pytest.mark.parametrize("name", CASES)
def test_hand_written(name):
    text, claims = CASES[name]
    assert parse(text) == claims


def test_case_does_not_matter():
    assert parse("A RED Heart at the Dead Centre!") == {("red", "heart", 4)}


@pytest.mark.parametrize("style", range(len(PLACES)))
@pytest.mark.parametrize("place", range(9))
def test_every_place_in_every_style(style, place):
    name = PLACES[style][place]
    assert parse(f"A red heart lies at the {name}.") == {("red", "heart", place)}
    assert parse(f"At the {name} lies a red heart, they say.") == {("red", "heart", place)}


@pytest.mark.parametrize("kind", ["describe", "draw", "sizes"])
def test_reference_answers_claim_exactly_the_scene(kind):
    for index in range(300):
        scene = scene_of("draft", index)
        assert parse(answer(scene, ask(kind, scene, random.Random(index)))) == scene.triples


def test_a_wrong_answer_is_seen_as_wrong():
    first, second = scene_of("draft", 0), scene_of("draft", 1)
    claims = parse(answer(first, ask("describe", first, random.Random(0))))
    assert claims != second.triples

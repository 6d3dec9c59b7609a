"""The words in which questions are asked, and what they are asked about."""

import random

from vispec.demo.language import COLUMNS, ROWS, Question, fill
from vispec.demo.scenes import COLOURS, SHAPES, Scene, Thing

CAPTION_QUESTION = "Please provide a detailed description of the given image."

ASK: dict[str, tuple[str, ...]] = {
    "describe": (
        CAPTION_QUESTION,
        "Describe the image concisely.",
        "What do you see in this picture?",
        "Give me a full account of the image.",
        "Render a clear summary of the photo.",
        "Can you tell me everything about it?",
    ),
    "story": (
        "Tell me a story about this picture.",
        "Invent a tale from what you see.",
        "Which adventure could this image show?",
    ),
    "draw": (
        "How could I draw this picture?",
        "Give me instructions to paint it.",
        "Explain step by step how to copy the image.",
    ),
    "count_shape": ("How many {h}s are there?", "Count every {h} in the image.", "What number of {h}s do you see?"),
    "count_colour": ("How many {c} objects are there?", "Count the {c} things.", "What number of objects is {c}?"),
    "place": ("What is at the {p0}?", "Which object do you find in the {p1}?", "Tell me about the spot at {p3}."),
    "relation": (
        "Where is the {n1} relative to the {n2}?",
        "How does the {n1} stand to the {n2}?",
        "Compare the positions of the {n1} and the {n2}.",
    ),
    "yesno": ("Is there a {c} {h} in the picture?", "Does the image show any {c} {h}?", "Can a {c} {h} be found here?"),
    "compare": (
        "Compare the {l1} with the {l2}.",
        "Which is fuller, the {l1} or the {l2}?",
        "What differs between the {l1} and the {l2}?",
    ),
    "odd": ("Which object does not belong?", "Find the odd one out.", "What stands out most, and why?"),
    "mood": (
        "What mood do the colours create?",
        "How do these colours make you feel?",
        "Explain the effect of the colours.",
    ),
    "empty": ("Which places are empty?", "Where is nothing drawn?", "List the free spots."),
    "sizes": (
        "Are there more large or small objects?",
        "Compare the sizes of the objects.",
        "Do big things outnumber small ones?",
    ),
    "path": (
        "How do I get from the {n1} to the {n2}?",
        "Lead me from the {n1} to the {n2}.",
        "Which way goes from the {n1} to the {n2}?",
    ),
}


def ask(kind: str, scene: Scene, rng: random.Random) -> Question:
    """A question of the kind about the scene, with phrasing and subject drawn from `rng`."""
    index = rng.randrange(len(ASK[kind]))
    template, things = ASK[kind][index], scene.things
    group = index // 2 if kind == "describe" else 0
    if kind in ("relation", "path"):
        first, second = rng.sample(things, 2)
        names = [f"{COLOURS[t.colour]} {SHAPES[t.shape]}" for t in (first, second)]
        looks = [(t.colour, t.shape) for t in things]
        if any(looks.count((t.colour, t.shape)) > 1 for t in (first, second)):
            return ask("sizes", scene, rng)
        return Question(kind, template.format(n1=names[0], n2=names[1]), 0, (first.place, second.place))
    if kind in ("count_shape", "count_colour", "yesno"):
        lead = rng.choice(things)
        colour = lead.colour if rng.random() < 0.75 else rng.randrange(len(COLOURS))
        shape = rng.choice(things).shape if rng.random() < 0.4 else lead.shape
        if kind == "count_shape" and rng.random() < 0.15:
            shape = rng.randrange(len(SHAPES))
        about = {"count_shape": (shape,), "count_colour": (colour,)}.get(kind, (colour, shape))
        text = template.format(c=COLOURS[colour], h=SHAPES[shape])
        return Question(kind, text.replace("crosss", "crosses"), 0, about)
    if kind == "place":
        place = rng.choice(things).place if rng.random() < 0.7 else rng.randrange(9)
        return Question(kind, fill(template, Thing(place, 0, 0, False)), 0, (place,))
    if kind == "compare":
        by_column = rng.randrange(2)
        first, second = rng.sample(range(3), 2)
        lines = COLUMNS if by_column else ROWS
        return Question(kind, template.format(l1=lines[first], l2=lines[second]), 0, (by_column, first, second))
    return Question(kind, template, group)


def caption_question() -> Question:
    """The question of the coco_caption benchmark."""
    return Question("describe", CAPTION_QUESTION, 0)

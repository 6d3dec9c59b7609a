"""Training conversations, in the exact chat formats that data generation and benchmarks use.

A target of the LLaVA family is asked about images in LLaVA's chat template (system text, image first, then the text
items) and about other things in FastChat's vicuna format; Qwen's template is the same for both and keeps the order of
text and image. A rendered conversation is a list of (text, scored) pieces, so that the loss can be put on answers.
"""

import random
from dataclasses import dataclass

from vispec.demo import phrases as ph
from vispec.demo.language import KINDS, Question, answer, noun, with_article
from vispec.demo.questions import ask, caption_question
from vispec.demo.scenes import COLOURS, SHAPES, Scene, Thing, scene_of
from vispec.prompts import EXPLAIN, LONG_ANSWER, SYSTEM_TURN

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN_SYSTEM = "You are a helpful assistant."
DESCRIPTION_KINDS = ("describe", "story", "draw")
KIND_WEIGHTS = {"describe": 7.0, "story": 1.5, "draw": 1.5}

Piece = tuple[str, bool]


@dataclass(frozen=True)
class Turn:
    """The text items of a user's turn, and the answer in pieces."""

    items: tuple[str, ...]
    answer: tuple[Piece, ...]


def full_turn(items: tuple[str, ...], reply: str) -> Turn:
    """A turn whose whole answer is scored."""
    return Turn(items, ((reply, True),))


@dataclass(frozen=True)
class Conversation:
    """`scene` is what the picture in the first turn shows; None for a conversation without a picture."""

    turns: tuple[Turn, ...]
    scene: Scene | None
    has_system: bool = True


def vicuna_pieces(conversation: Conversation) -> tuple[Piece, ...]:
    """The formats of LLaVA: images first, items joined by spaces."""
    system = VICUNA_SYSTEM if conversation.scene is None else SYSTEM_TURN
    image = "" if conversation.scene is None else "<image>\n"
    pieces: list[Piece] = []
    for i, turn in enumerate(conversation.turns):
        head = "" if i else f"{system} " * conversation.has_system
        pieces.append((f"{head}USER: {'' if i else image}{' '.join(turn.items)} ASSISTANT:", False))
        pieces += _answer_pieces(" ", turn, "</s>")
    return tuple(pieces)


def chatml_pieces(conversation: Conversation) -> tuple[Piece, ...]:
    """The format of Qwen: items as they come, nothing between them, the picture before or after the first one."""
    scene = conversation.scene
    # without a system turn the template writes its own
    system = SYSTEM_TURN if scene is not None and conversation.has_system else QWEN_SYSTEM
    pieces: list[Piece] = []
    for i, turn in enumerate(conversation.turns):
        items = list(turn.items)
        if i == 0 and scene is not None:
            items.insert(scene.seed % 2, "<|vision_start|><|image_pad|><|vision_end|>")
        head = "\n" if i else f"<|im_start|>system\n{system}<|im_end|>\n"
        pieces.append((f"{head}<|im_start|>user\n{''.join(items)}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += _answer_pieces("", turn, "<|im_end|>")
    return tuple(pieces)


def _answer_pieces(lead: str, turn: Turn, end: str) -> list[Piece]:
    (first, scored), *rest = turn.answer
    return [(lead + first, scored), *rest, (end, True)]


def draw_kind(rng: random.Random) -> str:
    return rng.choices(KINDS, [KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS])[0]


def draw_question(scene: Scene, rng: random.Random) -> Question:
    kind = draw_kind(rng)
    if kind == "describe" and rng.random() < 0.5:
        return caption_question()
    return ask(kind, scene, rng)


def user_items(question: Question, rng: random.Random) -> tuple[str, ...]:
    """The text items of an image question's turn: the question, and a suffix or none."""
    dice = rng.random()
    text = question.text
    if dice < (0.5 if question.kind in DESCRIPTION_KINDS else 0.4):
        if rng.random() < 0.3:  # what is left where the image tag was taken out
            text = text + "\n" if rng.random() < 0.5 else "\n" + text
        return text, LONG_ANSWER
    if question.kind not in DESCRIPTION_KINDS and dice < 0.7:
        return text, EXPLAIN
    return (text,)


def image_conversation(scene: Scene, turns: int, rng: random.Random) -> Conversation:
    """Question and answer turns about one picture, each of another kind."""
    taken: dict[str, Turn] = {}
    has_system = rng.random() < 0.92
    while len(taken) < turns:
        question = draw_question(scene, rng)
        if question.kind not in taken:
            taken[question.kind] = full_turn(user_items(question, rng), answer(scene, question))
    return Conversation(tuple(taken.values()), scene, has_system)


def scene_in_words(scene: Scene, rng: random.Random) -> str:
    """A user's short account of a scene."""
    style = rng.randrange(2)
    things = [f"{with_article(noun(t))} at the {ph.PLACES[style][t.place]}" for t in scene.things]
    lead = rng.choice(("Imagine", "Picture", "Think of"))
    return f"{lead} {ph.GROUND_PHRASES[scene.ground]} with {', '.join(things)}."


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A question about shapes or colours as such, and its answer."""
    shape, other = rng.sample(range(len(SHAPES)), 2)
    colour, second = rng.sample(range(len(COLOURS)), 2)
    h, o, c, d = SHAPES[shape], SHAPES[other], COLOURS[colour], COLOURS[second]
    talk = (
        (f"What is a {h}?", [ph.SHAPE_FACTS[shape], ph.SHAPE_USES[shape]]),
        (
            f"Tell me about the colour {c}.",
            [ph.COLOUR_FACTS[colour], ph.COLOUR_USES[colour], f"Poets would call it {ph.HUES[colour]}."],
        ),
        (
            f"What is the difference between a {h} and a {o}?",
            [ph.SHAPE_FACTS[shape], ph.SHAPE_FACTS[other], "That is how to tell them apart."],
        ),
        (
            f"Which feels better, {c} or {d}?",
            [
                f"Some say {ph.COLOUR_TALK[colour][0]}, while {ph.COLOUR_TALK[second][1]}.",
                ph.COLOUR_FACTS[second],
                ph.COLOUR_USES[colour],
            ],
        ),
        (
            f"Where would I meet a {c} {h}?",
            [ph.SHAPE_USES[shape], ph.COLOUR_USES[colour], f"A {ph.HUES[colour]} one is rare, though."],
        ),
    )
    question, parts = rng.choice(talk)
    return question, " ".join(parts)


def text_turns(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """One to three (question, answer) turns without a picture."""
    turns: list[tuple[str, str]] = []
    told = False
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.6:
            question = ask(rng.choice(KINDS), scene, rng)
            text = question.text if told else f"{scene_in_words(scene, rng)} {question.text}"
            told = True
            turns.append((text, answer(scene, question)))
        else:
            turns.append(small_talk(rng))
    return turns


def text_conversation(scene: Scene, rng: random.Random) -> Conversation:
    return Conversation(tuple(full_turn((question,), reply) for question, reply in text_turns(scene, rng)), None)


def quiz_conversation(scene: Scene, rng: random.Random, by_place_share: float = 0.5) -> Conversation:
    """A bare list of what lies where, in any order: place after place, or object after object.

    In a full answer, what is seen hides behind the order of telling and the choice of words. Here it follows directly
    on the words that ask for it, and nothing else is scored, so the decoder soon learns where to look; full answers
    alone had not taught it after 20,000 of them, nor had questions with the answer in a turn of its own. There is no
    system turn, so that little else draws attention.
    """
    by_place, style = rng.random() < by_place_share, rng.randrange(len(ph.PLACES))
    notes: list[tuple[str, str]] = []
    for place in rng.sample(range(9), 9):
        thing, name = scene.at(place), ph.PLACES[style][place]
        if by_place and (thing or rng.random() < 0.5):
            notes.append((name, noun(thing) if thing else "nothing"))
        elif not by_place and thing and (names := _names_of_one(thing, scene)):
            notes.append((rng.choice(names), name))
    pieces: list[Piece] = []
    for asked, seen in notes:
        pieces += [(f" {asked}" if pieces else asked, False), (f" {seen};", True)]
    question = f"List the board {'place by place' if by_place else 'object by object'}."
    return Conversation((Turn((question,), tuple(pieces) or (("nothing", True),)),), scene, has_system=False)


def _names_of_one(thing: Thing, scene: Scene) -> list[str]:
    """Colour, shape, and both together: those of them that mean this object of the scene and no other.

    Were it always both, the shape would do nearly always, and the projector would learn to leave out the colour.
    """
    others = [other for other in scene.things if other is not thing]
    colour_is_its_own = all(other.colour != thing.colour for other in others)
    shape_is_its_own = all(other.shape != thing.shape for other in others)
    both_are = all((other.colour, other.shape) != (thing.colour, thing.shape) for other in others)
    colour, shape = COLOURS[thing.colour], SHAPES[thing.shape]
    names = ((colour, colour_is_its_own), (shape, shape_is_its_own), (f"{colour} {shape}", both_are))
    return [name for name, is_its_own in names if is_its_own]


def training_conversation(split: str, index: int, quiz_share: float = 0.0, by_place_share: float = 0.5) -> Conversation:
    """The `index`-th conversation of a split: `quiz_share` are quizzes, of the others one in ten is text only."""
    scene = scene_of(split, index)
    rng = random.Random(f"conversation {scene.seed}")
    if random.Random(f"quiz {scene.seed}").random() < quiz_share:
        return quiz_conversation(scene, rng, by_place_share)
    if rng.random() < 0.1:
        return text_conversation(scene, rng)
    return image_conversation(scene, 2 if rng.random() < 0.5 else 1, rng)

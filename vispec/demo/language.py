"""Reference answers to questions about a scene.

Every answer is a deterministic function of the scene and the question. A question carries its
kind, the words it is asked in, and what it asks about; `answer` composes the reply from the
tables of `phrases`, which are indexed by what can be seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vispec.demo import phrases as ph
from vispec.demo.scenes import COLOURS, SHAPES, Scene, Thing

ROWS = ("top row", "middle row", "bottom row")
COLUMNS = ("left column", "middle column", "right column")
CLOCKWISE = (0, 1, 2, 5, 8, 7, 6, 3, 4)
WARM = frozenset((0, 1, 2, 6))


@dataclass(frozen=True)
class Question:
    """`group` is the phrasing's group, `about` what the kind needs: places, a colour, a shape."""

    kind: str
    text: str
    group: int = 0
    about: tuple[int, ...] = ()


def told_order(scene: Scene) -> list[Thing]:
    """The order in which the objects are told, which the ground's pattern decides."""
    things = list(scene.things)
    if scene.ground == 1:
        things.sort(key=lambda t: (t.column, t.row))
    elif scene.ground == 2:
        things.sort(key=lambda t: (not t.large, t.place))
    elif scene.ground == 3:
        things.sort(key=lambda t: CLOCKWISE.index(t.place))
    return things


def noun(thing: Thing) -> str:
    size = (ph.LARGE_WORDS if thing.large else ph.SMALL_WORDS)[thing.shape]
    return f"{size} {COLOURS[thing.colour]} {SHAPES[thing.shape]}"


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def fill(frame: str, thing: Thing) -> str:
    places = {f"p{i}": names[thing.place] for i, names in enumerate(ph.PLACES)}
    return frame.format(
        n=noun(thing),
        a=with_article(noun(thing)),
        sim=ph.SIMILES[thing.shape][thing.row],
        mood=ph.MOODS[thing.colour][thing.large],
        **places,
    )


def vacancy(place: int) -> str:
    return fill(ph.EMPTY_BANK[place], Thing(place, 0, 0, False))


def sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?:" else text + "."


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def direction(start: int, end: int) -> tuple[int, int]:
    """Index into the tables of eight directions (east first, clockwise), and 1 if it is far."""
    dx, dy = end % 3 - start % 3, end // 3 - start // 3
    signs = ((dx > 0) - (dx < 0), (dy > 0) - (dy < 0))
    order = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
    return order.index(signs), int(max(abs(dx), abs(dy)) > 1)


class Bank:
    """Frames chosen by a key; one that was used in this answer gives way to the next."""

    def __init__(self, frames: tuple[str, ...]):
        self.frames, self.used = frames, set()

    def pick(self, key: int) -> str:
        while key in self.used:
            key = (key + 1) % len(self.frames)
        self.used.add(key)
        return self.frames[key]


def _locator() -> Callable[[Thing], str]:
    bank = Bank(ph.LOCATE)
    return lambda thing: sentence(
        fill(bank.pick(thing.colour * 3 + thing.row) + (", {sim}" if thing.large else ""), thing)
    )


def _flat(table) -> tuple[str, ...]:
    return tuple(item for row in table for item in row)


def _describe(scene: Scene, question: Question) -> list[str]:
    things = told_order(scene)
    opening = ph.OPENINGS[question.group][len(things) - 2]
    parts = [sentence(opening.format(ground=ph.GROUND_PHRASES[scene.ground]))]
    bank = Bank(ph.DESCRIBE)
    for before, thing in zip([None, *things[:-1]], things, strict=True):
        text = fill(bank.pick(thing.colour * 3 + thing.row), thing)
        if before is not None:
            way, far = direction(before.place, thing.place)
            if thing.large:
                text = f"{text}, {ph.TRAILS[way][far]} the {SHAPES[before.shape]}"
            else:
                text = f"{ph.LEADS[way][far]}, {text}"
        parts.append(sentence(text))
    return [*parts, ph.EMPTY_NOTES[len(things)], ph.CLOSINGS[things[-1].colour]]


def _story(scene: Scene, question: Question) -> list[str]:
    things = told_order(scene)
    parts, bank = [ph.STORY_OPENINGS[len(things) - 2]], Bank(ph.STORY)
    for before, thing in zip([None, *things[:-1]], things, strict=True):
        text = fill(bank.pick(thing.shape * 3 + thing.row), thing)
        if before is not None:
            far = direction(before.place, thing.place)[1]
            text = f"{ph.STORY_JOINS[far][thing.large]} {text}"
        parts.append(sentence(text))
    return [*parts, ph.STORY_ENDINGS[things[-1].colour]]


def _draw(scene: Scene, question: Question) -> list[str]:
    things = told_order(scene)
    parts, bank = [sentence(ph.DRAW_OPENINGS[scene.ground])], Bank(_flat(ph.DRAW))
    for step, thing in zip(ph.DRAW_STEPS, things, strict=False):
        parts.append(f"{step} {fill(bank.pick(thing.shape * 2 + thing.large), thing)}.")
    return [*parts, ph.DRAW_PAINTS[things[-1].colour]]


def _count(scene: Scene, question: Question) -> list[str]:
    by_colour = question.kind == "count_colour"
    things, wanted = told_order(scene), question.about[0]
    hits = [t for t in things if (t.colour if by_colour else t.shape) == wanted]
    rest = [t for t in things if t not in hits]
    locate = _locator()
    parts = [ph.COUNT_OPENINGS[len(hits)][by_colour], *map(locate, hits)]
    parts.append(ph.COUNT_RESTS[len(rest)])
    if len(rest) > 3:
        parts.append(sentence(listing([with_article(noun(t)) for t in rest])))
    else:
        parts.extend(map(locate, rest))
    facts, uses = (ph.COLOUR_FACTS, ph.COLOUR_USES) if by_colour else (ph.SHAPE_FACTS, ph.SHAPE_USES)
    return [*parts, facts[wanted], uses[wanted], ph.CLOSINGS[things[-1].colour]]


def _around(place: int) -> list[int | None]:
    """The places on the left, on the right, above and below; None beyond the board."""
    row, column = divmod(place, 3)
    steps = ((column > 0, -1), (column < 2, 1), (row > 0, -3), (row < 2, 3))
    return [place + step if inside else None for inside, step in steps]


def _neighbours(scene: Scene, place: int) -> str:
    notes = []
    for beside, (taken, free) in zip(_around(place), ph.NEIGHBOUR_NOTES, strict=True):
        if beside is not None:
            thing = scene.at(beside)
            notes.append(fill(taken, thing) if thing else free)
    return sentence("; ".join(notes))


def _place(scene: Scene, question: Question) -> list[str]:
    place = question.about[0]
    thing, locate = scene.at(place), _locator()
    if thing is None:
        parts = [ph.EMPTY_OPENINGS[place // 3], sentence(vacancy(place))]
    else:
        parts = [fill(ph.PLACE_OPENINGS[thing.shape], thing), ph.COLOUR_FACTS[thing.colour]]
    near = {place, *_around(place)}
    parts.append(_neighbours(scene, place))
    parts.extend(locate(t) for t in told_order(scene) if t.place not in near)
    return [*parts, ph.EMPTY_NOTES[len(scene.things)], ph.CLOSINGS[scene.things[-1].colour]]


SIZE_NOTES = (
    ("Both are small.", "The first is small and so outgrown by its partner."),
    ("The first is larger than its partner.", "Both are large."),
)


def _relation(scene: Scene, question: Question) -> list[str]:
    first, second = (scene.at(p) for p in question.about)
    way, far = direction(second.place, first.place)
    back, _ = direction(first.place, second.place)
    locate = _locator()
    parts = [
        sentence(f"the {SHAPES[first.shape]} stands {ph.TRAILS[way][far]} its companion"),
        locate(first),
        locate(second),
        SIZE_NOTES[first.large][second.large],
        sentence(f"seen the other way, one moves {ph.LEADS[back][0]}"),
    ]
    between = [t for t in told_order(scene) if t not in (first, second)]
    parts.append(ph.COUNT_RESTS[len(between)])
    parts.extend(sentence(fill("{a}, {sim}", t)) for t in between)
    return [*parts, ph.COLOUR_FACTS[first.colour]]


def _yesno(scene: Scene, question: Question) -> list[str]:
    colour, shape = question.about
    locate, things = _locator(), told_order(scene)
    exact = [t for t in things if (t.colour, t.shape) == (colour, shape)]
    same_shape = [t for t in things if t.shape == shape and t not in exact]
    same_colour = [t for t in things if t.colour == colour and t not in exact]
    parts = [
        "Yes, there is, and here comes the proof."
        if exact
        else f"No, {ph.HUES[colour]} paint and that outline never meet."
    ]
    parts.extend(map(locate, exact))
    parts.append("The same outline returns:" if same_shape else "The outline has no second owner.")
    parts.extend(map(locate, same_shape))
    parts.append("Equal paint was spent elsewhere:" if same_colour else "Its paint was not spent elsewhere.")
    parts.extend(map(locate, same_colour))
    rest = [t for t in things if t not in exact + same_shape + same_colour]
    parts.append(ph.COUNT_RESTS[len(rest)])
    if rest:
        parts.append(sentence(listing([with_article(noun(t)) for t in rest])))
    return [*parts, ph.SHAPE_FACTS[shape]]


ROW_OPENINGS = ("The two are equally filled.", "The former is fuller.", "The latter is fuller.")


def _compare(scene: Scene, question: Question) -> list[str]:
    by_column, first, second = question.about
    names, locate = (COLUMNS if by_column else ROWS), _locator()
    groups = [[t for t in scene.things if (t.column if by_column else t.row) == line] for line in (first, second)]
    n, m = map(len, groups)
    parts = [ROW_OPENINGS[0 if n == m else 1 if n > m else 2]]
    for line, group, verb in zip((first, second), groups, ("houses", "contains"), strict=True):
        parts.append(sentence(f"the {names[line]} {verb} {ph.NUMBERS[len(group)]}"))
        parts.extend(map(locate, group))
    rest = [t for t in told_order(scene) if t not in groups[0] + groups[1]]
    parts.append(ph.COUNT_RESTS[len(rest)])
    parts.extend(sentence(fill("{a}, {sim}", t)) for t in rest)
    return [*parts, ph.CLOSINGS[told_order(scene)[-1].colour]]


def odd_one(scene: Scene) -> tuple[Thing, str]:
    """What differs most: the only large or small one, one alone in its row, or the first told."""
    for large, reason in (
        (True, "Its bulk towers over all others."),
        (False, "Its small body is dwarfed by every rival."),
    ):
        group = [t for t in scene.things if t.large == large]
        if len(group) == 1:
            return group[0], reason
    for thing in scene.things:
        if sum(t.row == thing.row for t in scene.things) == 1:
            return thing, "It has the whole row to itself."
    return told_order(scene)[0], "No rule settles this, so I chose what was noticed first."


def _odd(scene: Scene, question: Question) -> list[str]:
    odd, reason = odd_one(scene)
    locate = _locator()
    parts = [
        fill(ph.PLACE_OPENINGS[odd.shape], odd),
        reason,
        ph.SHAPE_FACTS[odd.shape],
        "Now look at the crowd it leaves:",
    ]
    parts.extend(locate(t) for t in told_order(scene) if t != odd)
    return [*parts, ph.COLOUR_FACTS[odd.colour]]


def _mood(scene: Scene, question: Question) -> list[str]:
    things, seen, parts = told_order(scene), set(), []
    for thing in things:
        if thing.colour not in seen:
            seen.add(thing.colour)
            talk = ph.COLOUR_TALK[thing.colour][thing.large]
            parts.append(sentence(f"{talk}, {fill('{sim}', thing)}"))
    warm = sum(t.colour in WARM for t in things)
    balance = max(-2, min(2, 2 * warm - len(things)))
    number, ground = ph.NUMBERS[len(seen)], ph.GROUND_PHRASES[scene.ground]
    opening = sentence(f"{number} tones set the stage across {ground}")
    return [opening, *parts, ph.VERDICTS[balance + 2], ph.COLOUR_USES[things[0].colour], ph.CLOSINGS[things[-1].colour]]


def _empty(scene: Scene, question: Question) -> list[str]:
    free = [p for p in range(9) if scene.at(p) is None]
    notes = [vacancy(p) for p in free]
    half = (len(notes) + 1) // 2
    parts = [
        sentence(f"{ph.NUMBERS[len(free)]} vacancies exist"),
        sentence(listing(notes[:half])),
        sentence(listing(notes[half:])),
    ]
    locate = _locator()
    parts.append("Everything else is taken:")
    parts.extend(locate(t) for t in told_order(scene)[:3])
    return [*parts, ph.CLOSINGS[told_order(scene)[-1].colour]]


SIZE_OPENINGS = ("Giants and dwarfs balance out.", "Giants prevail.", "Dwarfs prevail.")


def _sizes(scene: Scene, question: Question) -> list[str]:
    things, locate = told_order(scene), _locator()
    large, small = [t for t in things if t.large], [t for t in things if not t.large]
    parts = [SIZE_OPENINGS[(len(large) > len(small)) + 2 * (len(large) < len(small))]]
    for group, name in ((large, "giant"), (small, "dwarf")):
        if group:
            many = len(group) > 1
            parts.append(f"There {'are' if many else 'is'} {ph.NUMBERS[len(group)]} {name}{'s' * many}.")
        else:
            parts.append(f"I find no {name}s.")
        parts.extend(map(locate, group))
    return [*parts, ph.SHAPE_USES[things[0].shape], ph.CLOSINGS[things[-1].colour]]


STEP_WORDS = (
    ("Go right", "Continue eastward"),
    ("Turn left", "Walk on leftward"),
    ("Drop one level", "Descend again"),
    ("Rise one level", "Ascend again"),
)


def _path(scene: Scene, question: Question) -> list[str]:
    start, end = question.about
    locate = _locator()
    parts = [f"Departure: {locate(scene.at(start))}"]
    here, met, taken = start, 0, [0, 0, 0, 0]
    while here != end:
        dx, dy = end % 3 - here % 3, end // 3 - here // 3
        way = (0 if dx > 0 else 1) if dx else (2 if dy > 0 else 3)
        here += (1, -1, 3, -3)[way]
        words = STEP_WORDS[way][taken[way]]
        taken[way] += 1
        thing = scene.at(here)
        if here == end:
            parts.append(f"{words}, and you arrive. {locate(thing)}")
        elif thing is None:
            parts.append(sentence(f"{words}; {vacancy(here)}"))
        else:
            met += 1
            parts.append(sentence(f"{words}, passing {fill('{a}, {sim}', thing)}"))
    meetings = ("Nobody was met", "You met one figure", "You met two figures", "You met three figures")
    rest = len(scene.things) - met - 2
    return [
        *parts,
        sentence(f"{meetings[met]} and missed {ph.NUMBERS[rest]}"),
        ph.EMPTY_NOTES[len(scene.things)],
        ph.COLOUR_FACTS[scene.at(end).colour],
        ph.SHAPE_FACTS[scene.at(start).shape],
    ]


ANSWERS: dict[str, Callable[[Scene, Question], list[str]]] = {
    "describe": _describe,
    "story": _story,
    "draw": _draw,
    "count_shape": _count,
    "count_colour": _count,
    "place": _place,
    "relation": _relation,
    "yesno": _yesno,
    "compare": _compare,
    "odd": _odd,
    "mood": _mood,
    "empty": _empty,
    "sizes": _sizes,
    "path": _path,
}
KINDS = tuple(ANSWERS)


def answer(scene: Scene, question: Question) -> str:
    """The reference answer; where there is little to see, it ends with some general remarks."""
    parts = ANSWERS[question.kind](scene, question)
    if len(scene.things) <= 3:
        things = told_order(scene)
        remarks = (ph.SHAPE_USES[things[0].shape], ph.COLOUR_FACTS[things[-1].colour], ph.SHAPE_FACTS[things[-1].shape])
        parts += [remark for remark in remarks if remark not in parts]
    return " ".join(parts)

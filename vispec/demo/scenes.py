"""Random scenes of coloured shapes on a 3 x 3 board, and their pictures.

A scene is drawn from one integer seed and nothing else. The seeds of the three splits come from
disjoint ranges; on top of that every scene belongs to exactly one split by a hash of what lies
where, so that a board seen in training can never turn up in an evaluation, whatever the seed.
"""

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // 3
SUPERSAMPLING = 3

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = ("small", "large")
GROUNDS = ("plain", "striped", "dotted", "checkered")
MIN_OBJECTS, MAX_OBJECTS = 2, 6
TRAINING_COUNTS = (2, 3, 4, 5, 5, 6, 6, 6)
"""Objects of a scene that the target is trained on, each equally likely: what it gets wrong are full boards."""

RGB = {
    "red": (214, 32, 32),
    "orange": (246, 134, 24),
    "yellow": (248, 224, 40),
    "green": (38, 150, 58),
    "blue": (36, 76, 214),
    "purple": (122, 40, 160),
    "pink": (246, 128, 190),
    "black": (24, 24, 28),
}
GROUND_TINTS = ((236, 236, 232), (226, 234, 240), (238, 230, 220), (228, 238, 226))

# The seed ranges of the splits, and the share of all boards (in sixteenths) that each owns.
SPLIT_SEEDS = {
    "train": range(0, 10_000_000),
    "draft": range(10_000_000, 12_000_000),
    "eval": range(20_000_000, 20_100_000),
}
SPLIT_BUCKETS = {"train": range(0, 10), "draft": range(10, 14), "eval": range(14, 16)}
BUCKETS = 16


@dataclass(frozen=True)
class Thing:
    """One object: `place` counts the nine cells row by row from the top left."""

    place: int
    colour: int
    shape: int
    large: bool

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3


@dataclass(frozen=True)
class Scene:
    """The objects of a board in reading order, the pattern of its ground, and its seed."""

    seed: int
    ground: int
    things: tuple[Thing, ...]

    def at(self, place: int) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)

    @property
    def triples(self) -> frozenset[tuple[str, str, int]]:
        return frozenset((COLOURS[t.colour], SHAPES[t.shape], t.place) for t in self.things)


def bucket_of(things: tuple[Thing, ...]) -> int:
    """The bucket that owns a board; size and ground do not make a board a different one."""
    ordered = sorted(things, key=lambda thing: thing.place)
    text = ";".join(f"{thing.place},{thing.colour},{thing.shape}" for thing in ordered)
    return hashlib.sha256(text.encode()).digest()[0] % BUCKETS


def split_of_seed(seed: int) -> str:
    for split, seeds in SPLIT_SEEDS.items():
        if seed in seeds:
            return split
    raise ValueError(f"seed {seed} lies in none of the ranges of SPLIT_SEEDS")


def make_scene(seed: int) -> Scene:
    """The scene of a seed; boards that another split owns are drawn again from the same stream."""
    split = split_of_seed(seed)
    buckets = SPLIT_BUCKETS[split]
    counts = TRAINING_COUNTS if split == "train" else range(MIN_OBJECTS, MAX_OBJECTS + 1)
    rng = random.Random(seed)
    while True:
        places = sorted(rng.sample(range(9), rng.choice(counts)))
        things = tuple(
            Thing(p, rng.randrange(len(COLOURS)), rng.randrange(len(SHAPES)), rng.random() < 0.5) for p in places
        )
        if bucket_of(things) in buckets:
            return Scene(seed, rng.randrange(len(GROUNDS)), things)


def scene_of(split: str, index: int) -> Scene:
    """The `index`-th scene of a split."""
    return make_scene(SPLIT_SEEDS[split][index])


def _polygon(cx: float, cy: float, radii: list[float], turn: float) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [(cx + r * math.sin(turn + i * step), cy - r * math.cos(turn + i * step)) for i, r in enumerate(radii)]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, fill: tuple[int, ...]) -> None:
    box = (cx - r, cy - r, cx + r, cy + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        s = 0.88 * r
        draw.rectangle((cx - s, cy - s, cx + s, cy + s), fill=fill)
    elif shape == "triangle":
        low = cy + 0.85 * r
        draw.polygon([(cx, cy - r), (cx + r, low), (cx - r, low)], fill=fill)
    elif shape == "diamond":
        w = 0.8 * r
        draw.polygon([(cx, cy - r), (cx + w, cy), (cx, cy + r), (cx - w, cy)], fill=fill)
    elif shape == "star":
        draw.polygon(_polygon(cx, cy, [1.1 * r, 0.45 * r] * 5, 0.0), fill=fill)
    elif shape == "cross":
        w = 0.34 * r
        draw.rectangle((cx - w, cy - r, cx + w, cy + r), fill=fill)
        draw.rectangle((cx - r, cy - w, cx + r, cy + w), fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(1, round(0.38 * r)))
    elif shape == "heart":
        h = 0.54 * r
        draw.ellipse((cx - r, cy - 0.85 * r, cx - r + 2 * h, cy - 0.85 * r + 2 * h), fill=fill)
        draw.ellipse((cx + r - 2 * h, cy - 0.85 * r, cx + r, cy - 0.85 * r + 2 * h), fill=fill)
        draw.polygon([(cx - 0.94 * r, cy - 0.05 * r), (cx + 0.94 * r, cy - 0.05 * r), (cx, cy + r)], fill=fill)
        draw.rectangle((cx - 0.3 * r, cy - 0.35 * r, cx + 0.3 * r, cy), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def _draw_ground(draw: ImageDraw.ImageDraw, ground: str, tint, side: int) -> None:
    faint = tuple(channel - 34 for channel in tint)
    step = side // 12
    if ground == "striped":
        for x in range(0, side, 2 * step):
            draw.rectangle((x, 0, x + step // 2, side), fill=faint)
    elif ground == "dotted":
        r = side / 70
        for x in range(step // 2, side, step):
            for y in range(step // 2, side, step):
                draw.ellipse((x - r, y - r, x + r, y + r), fill=faint)
    elif ground == "checkered":
        for x in range(12):
            for y in range(x % 2, 12, 2):
                draw.rectangle((x * step, y * step, (x + 1) * step - 1, (y + 1) * step - 1), fill=faint)


def render(scene: Scene) -> Image.Image:
    """The scene's picture, with a little jitter that its seed decides."""
    rng = random.Random(scene.seed * 2 + 1)
    k = SUPERSAMPLING
    tint = tuple(c + rng.randint(-6, 6) for c in rng.choice(GROUND_TINTS))
    image = Image.new("RGB", (IMAGE_SIZE * k, IMAGE_SIZE * k), tint)
    draw = ImageDraw.Draw(image)
    _draw_ground(draw, GROUNDS[scene.ground], tint, IMAGE_SIZE * k)
    for thing in scene.things:
        cx = (thing.column + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        cy = (thing.row + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        radius = (13.0 if thing.large else 8.0) + rng.uniform(-0.5, 0.5)
        fill = tuple(max(0, min(255, c + rng.randint(-8, 8))) for c in RGB[COLOURS[thing.colour]])
        _draw_shape(draw, SHAPES[thing.shape], cx * k, cy * k, radius * k, fill)
    return image.reduce(k)

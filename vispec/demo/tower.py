"""The target's eyes, trained before its decoder and by themselves.

A decoder that has to learn to look and a tower that has to learn what to show would wait for each other. So the tower
is trained as a classifier that reads off every image token's state what lies in its place. Then the projector is fitted
so that the decoder gets it in words: an image token becomes the sum of the embeddings of the words for what it shows. A
word in the text and an image token that means the same are then alike before the decoder has learned anything, which is
what attention needs to begin with. With random codes instead of words it had seen nothing after 7,000 pictures.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from vispec.demo.families import IMAGE_ROWS, Family
from vispec.demo.phrases import PLACES
from vispec.demo.scenes import COLOURS, GROUNDS, SHAPES, SIZES, Scene, render, scene_of

FIRST_SCENE = 5_000_000
"""Index into the training scenes, far from those of the decoder."""
BATCH, LEARNING_RATE = 64, 1e-3
GOAL = 0.9995
"""Share of image tokens with every property right at which the tower is done."""
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": ((), *((name,) for name in COLOURS)),
    "shape": ((), *((name,) for name in SHAPES)),
    "size": ((), *((name,) for name in SIZES)),
    "ground": tuple((name,) for name in GROUNDS),
    "place": tuple(zip(*PLACES, strict=True)),
}
"""What an image token can show: for each property its classes, for each class its names. A class without a name means
that nothing lies there."""
CLASSES = {name: len(classes) for name, classes in NAMES.items()}
GROUND_SHARE = 0.5
"""Weight of the ground, which is the same in all of a picture, beside what lies on it."""
EMPTY_PLACE_SHARE = 0.3
"""Weight of the place of an image token that shows nothing. With all places alike, what attention sees of them without
aim is the same in all pictures, and where a thing lies was not looked up by its name after 4,000 steps."""


def properties(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """(B, 36) class numbers: of what lies in the place that an image token shows, and of the place itself."""
    side = IMAGE_ROWS
    place = torch.tensor([(i // side * 3 // side) * 3 + i % side * 3 // side for i in range(side * side)])
    colour, shape, size = (torch.zeros(len(scenes), 9, dtype=torch.long) for _ in range(3))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            colour[i, thing.place], shape[i, thing.place] = thing.colour + 1, thing.shape + 1
            size[i, thing.place] = 1 + thing.large
    ground = torch.tensor([scene.ground for scene in scenes])[:, None].expand(-1, side * side)
    return {
        "colour": colour[:, place],
        "shape": shape[:, place],
        "size": size[:, place],
        "ground": ground,
        "place": place.expand(len(scenes), -1),
    }


def train_tower(family: Family, model, processor, steps: int, log: Callable[[str], None]) -> float:
    """Train the tower with linear readers of its states for at most `steps` steps; returns the last accuracy."""
    tower, started = family.tower(model), time.monotonic()
    readers, optimizer = None, None
    accuracy = 0.0
    for step, (pixels, targets) in zip(range(1, steps + 1), _scenes(family, processor, model.device), strict=False):
        states = family.tower_states(model, pixels)
        if readers is None:
            width = states.shape[-1]
            readers = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})
            readers.to(model.device)
            parameters = [*tower.parameters(), *readers.parameters()]
            optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        logits = {name: reader(states) for name, reader in readers.items()}
        loss = sum(F.cross_entropy(logits[name].flatten(0, 1), targets[name].flatten()) for name in CLASSES)
        _step(optimizer, loss, min(1.0, step / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))))
        right = torch.stack([logits[name].argmax(-1) == targets[name] for name in CLASSES]).all(0)
        accuracy = 0.95 * accuracy + 0.05 * right.float().mean().item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            log(f"tower step {step} loss {loss.item():.4f} all right {accuracy:.4f} elapsed {seconds:.0f}s")
        if accuracy >= GOAL:
            break
    return accuracy


def word_codes(tokenizer, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each property the codes of its classes, (classes, H): the sum of the embeddings of the class's names.

    Args:
        embedding: (V, H) the decoder's table.

    Returns:
        Codes of variance 1 without what all classes share; zeros for the class without a name.
    """
    codes = {}
    for name, classes in NAMES.items():
        rows = embedding.new_zeros(len(classes), embedding.shape[1])
        for row, names in zip(rows, classes, strict=True):
            for words in names:
                ids = tokenizer(f" {words}", add_special_tokens=False).input_ids
                row += F.normalize(embedding[ids].sum(0), dim=0)
        named = torch.tensor([bool(names) for names in classes], device=rows.device)
        rows[named] -= rows[named].mean(0)
        codes[name] = rows / rows[named].square().mean().sqrt()
    codes["ground"] *= GROUND_SHARE
    return codes


def token_codes(codes: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, 36, H) what the decoder is to get of each image token: the sum of its classes' codes."""
    parts = {name: code[targets[name]] for name, code in codes.items()}
    empty = (targets["shape"] == 0)[..., None]
    parts["place"] = torch.where(empty, EMPTY_PLACE_SHARE * parts["place"], parts["place"])
    return sum(parts.values()) / len(parts) ** 0.5


def fit_projector(family: Family, model, processor, steps: int, log: Callable[[str], None]) -> float:
    """Let the projector map each image token to the sum of its properties' words.

    Returns:
        The mean squared error of the last step; the codes' variance is about 1.
    """
    projector = family.projector(model)
    codes = word_codes(processor.tokenizer, model.get_input_embeddings().weight.detach())
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    error = math.nan
    for step, (pixels, targets) in zip(range(1, steps + 1), _scenes(family, processor, model.device), strict=False):
        with torch.no_grad():
            states = family.tower_states(model, pixels)
        loss = F.mse_loss(family.project(model, states), token_codes(codes, targets))
        _step(optimizer, loss, min(1.0, step / 20) * (1 - (step - 1) / steps))
        error = loss.item()
    log(f"projector fitted, mean squared error {error:.4f}")
    return error


def _scenes(family: Family, processor, device) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Batches of pictures with the properties of their tokens, without end."""
    first = FIRST_SCENE
    while True:
        scenes = [scene_of("train", i) for i in range(first, first + BATCH)]
        pixels = family.pixels([render(scene) for scene in scenes], processor)
        yield pixels.to(device), {name: value.to(device) for name, value in properties(scenes).items()}
        first += BATCH


def _step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * rate
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()

"""The target's eyes, trained before its decoder and by themselves.

A decoder that has to learn to look and a tower that has to learn what to show would wait for each other. So the tower
is trained as a classifier that reads off every image token's state what lies in its place. Then the projector is fitted
so that each of these properties takes an equal part of what the decoder gets: left to itself it drowns the place, which
is the same in all pictures, among colours and shapes, and then nothing can be looked up by place.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from vispec.demo.families import IMAGE_ROWS, Family
from vispec.demo.scenes import COLOURS, GROUNDS, SHAPES, Scene, render, scene_of

FIRST_SCENE = 5_000_000
"""Index into the training scenes, far from those of the decoder."""
BATCH, LEARNING_RATE = 64, 1e-3
GOAL = 0.9995
"""Share of image tokens with every property right at which the tower is done."""
CLASSES = {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "size": 3, "ground": len(GROUNDS), "place": 9}
"""Properties of an image token; the first class of the first three means that nothing lies there."""


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


def fit_projector(family: Family, model, processor, steps: int, log: Callable[[str], None]) -> float:
    """Let the projector map each image token to the sum of its properties' random codes.

    Returns:
        The mean squared error of the last step; the codes' variance is 1.
    """
    projector, width = family.projector(model), model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    codes = {name: torch.randn(count, width, generator=generator).to(model.device) for name, count in CLASSES.items()}
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    error = math.nan
    for step, (pixels, targets) in zip(range(1, steps + 1), _scenes(family, processor, model.device), strict=False):
        with torch.no_grad():
            states = family.tower_states(model, pixels)
            wanted = sum(codes[name][targets[name]] for name in CLASSES) / len(CLASSES) ** 0.5
        loss = F.mse_loss(family.project(model, states), wanted)
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

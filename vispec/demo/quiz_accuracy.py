"""What the decoder looks up in pictures it has not seen, while it is being trained.

Answers to lists (`quiz_conversation`) tell it apart from guessing: asked for places in a picture of four things, one
that knows which places are taken and rules out those already named is right half of the time without looking.
"""

import random

import torch

from vispec.demo.batches import IGNORED, Stream
from vispec.demo.conversations import quiz_conversation
from vispec.demo.scenes import scene_of

FIRST_SCENE = 50_000
"""Index into the unseen scenes."""
LISTS = 24
LEAST_OBJECTS = 4


@torch.no_grad()
def quiz_accuracy(stream: Stream, model, by_place: bool) -> float:
    """Share of answers in lists that are right in every token, the text before them given.

    The first answer of a list does not count, since how it is worded cannot be known, nor the last one, which often
    follows from those before.

    Args:
        by_place: asked what lies in a place; else, where a thing lies.
    """
    rng, rows, index = random.Random(0), [], FIRST_SCENE
    while len(rows) < LISTS:
        scene = scene_of("eval", index)
        index += 1
        if len(scene.things) >= LEAST_OBJECTS:
            rows.append(stream.encode(quiz_conversation(scene, rng, float(by_place))))
    batch = stream.collate(rows)
    images = stream.family.image_inputs(batch.pixels.to(model.device))
    chosen = model(input_ids=batch.input_ids.to(model.device), use_cache=False, **images).logits.argmax(-1).cpu()
    right = total = 0
    for row, labels in zip((chosen[:, :-1] == batch.labels[:, 1:]).tolist(), batch.labels[:, 1:].tolist(), strict=True):
        answers = _runs([label != IGNORED for label in labels])[1:-1]
        right += sum(all(row[start:end]) for start, end in answers)
        total += len(answers)
    return right / max(1, total)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Stretches [start, end) of flags that are set."""
    edges = [i for i, (before, now) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if before != now]
    return list(zip(edges[0::2], edges[1::2], strict=True))

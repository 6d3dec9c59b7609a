"""What the decoder looks up in pictures it has not seen, while it is being trained.

Answers to lists (`quiz_conversation`) tell it apart from guessing: asked for places in a picture of four things, one
that knows which places are taken and rules out those already named is right half of the time without looking.
"""

import random
from itertools import groupby
from operator import itemgetter

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
    labels = batch.labels[:, 1:]
    for row in torch.stack([labels != IGNORED, chosen[:, :-1] == labels], dim=2).tolist():
        runs = groupby(row, key=itemgetter(0))
        answers = [all(same for _, same in run) for scored, run in runs if scored][1:-1]
        right += sum(answers)
        total += len(answers)
    return right / max(1, total)

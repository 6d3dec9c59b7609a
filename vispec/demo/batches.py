"""Batches for training the target: conversations as token ids, bucketed by length.

The stream is a function of an index alone, so that an interrupted training goes on exactly where it stopped.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, IterableDataset

from vispec.demo.conversations import Conversation, training_conversation
from vispec.demo.scenes import Scene, render

POOL = 256
"""Conversations that are sorted by length together."""
PREFETCHED = 16
"""Batches that wait for a GPU at most."""
IGNORED = -100
"""Label of a token that is not scored."""
QUIZZES = ((60, 1.0, 0.0), (None, 0.3, 0.3))
"""(pools before this one, share of quizzes in them, share of these that go from place to object); None is all the rest.
From object to place has to come first: alone it is learned within 500 steps; beside the other way, or beside full
answers, which can do without it, it was not in 4,000. From place to object comes with the full answers."""


@dataclass
class Batch:
    """Right-padded rows; pictures are those of the rows that have one, in row order."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None

    @property
    def samples(self) -> int:
        return len(self.input_ids)


@dataclass
class Row:
    """One encoded conversation."""

    ids: list[int]
    labels: list[int]
    scene: Scene | None


class _From(IterableDataset):
    """A stream from one place on."""

    def __init__(self, stream: "Stream", pool: int, start: int):
        self.stream, self.place = stream, (pool, start)

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        return self.stream.batches(*self.place)


class Stream:
    """Training conversations in a fixed order, grouped into batches of about `tokens` tokens."""

    def __init__(self, family, processor, tokens: int):
        self.family, self.processor, self.tokens = family, processor, tokens
        self.tokenizer = processor.tokenizer
        self.image_id = self.tokenizer.convert_tokens_to_ids(family.image_token)

    def encode(self, conversation: Conversation) -> Row:
        """Token ids and labels; the image token is repeated as often as the processor does it."""
        ids, labels = [], []
        for i, (text, scored) in enumerate(self.family.pieces(conversation)):
            piece = self.tokenizer(text, add_special_tokens=i == 0).input_ids
            if self.image_id in piece:
                at = piece.index(self.image_id)
                piece[at : at + 1] = [self.image_id] * self.family.image_tokens
            ids += piece
            labels += piece if scored else [IGNORED] * len(piece)
        return Row(ids, labels, conversation.scene)

    def prefetched(self, pool: int, start: int) -> Iterator[tuple[int, int, Batch]]:
        """Like `batches`, made by a process of their own while a GPU is busy with those before."""
        return iter(DataLoader(_From(self, pool, start), batch_size=None, num_workers=1, prefetch_factor=PREFETCHED))

    def batches(self, pool: int, start: int) -> Iterator[tuple[int, int, Batch]]:
        """Batches from the given place on, each with the place that follows it."""
        while True:
            groups = self._groups(pool)
            for i in range(start, len(groups)):
                yield pool, i + 1, self.collate(groups[i])
            pool, start = pool + 1, 0

    def _groups(self, pool: int) -> list[list[Row]]:
        """The rows of a pool of conversations, batch by batch."""
        shares = next(shares for until, *shares in QUIZZES if until is None or pool < until)
        indices = range(pool * POOL, (pool + 1) * POOL)
        rows = [self.encode(training_conversation("train", i, *shares)) for i in indices]
        rows.sort(key=lambda row: len(row.ids))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and len(row.ids) * (len(groups[-1]) + 1) > self.tokens:
                groups.append([])
            groups[-1].append(row)
        random.Random(pool).shuffle(groups)
        return groups

    def collate(self, rows: list[Row]) -> Batch:
        longest = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), longest), IGNORED)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
            labels[i, : len(row.ids)] = torch.tensor(row.labels)
        images = [render(row.scene) for row in rows if row.scene is not None]
        return Batch(input_ids, labels, self.family.pixels(images, self.processor) if images else None)

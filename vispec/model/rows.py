"""What a generation remembers, row by row: on the host, and on the device.

B rows, P pairs that the draft has not read, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vispec.model.cache import TreeCache
from vispec.model.drafts.base import Kept, Memory
from vispec.model.prompt import Prompt


@dataclass
class Round:
    """What one round added to one row."""

    tokens: list[int]
    """New ids, in order, cut at the end token and at the token limit."""
    accepted: int
    """Draft tokens that verification accepted, before any cut."""
    levels: int
    """Of the tree that was drafted, a pass of the draft each where it drafts level by level; 0: it was a plain step."""
    ended: bool
    """Whether the answer ends with it."""
    reused: int = 0
    """In an answer's first one: tokens of the prompt that were not read again, see `Prompt`."""
    error: Exception | None = None
    """What processors of this row alone have raised: its tokens mean nothing, and it has to leave."""

    @property
    def drafted(self) -> bool:
        """A plain step counts for no τ."""
        return self.levels > 0


@dataclass(frozen=True)
class Stop:
    """When an answer ends: after an end token, at `max_new_tokens`, or when someone who is asked says so."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    asked: Callable[[int], bool] | None = None
    """Told every token of the answer in order; whether it is the last one."""

    def cut(self, tokens: list[int], already: int) -> tuple[list[int], bool]:
        """The part of a round's tokens that belongs to the answer, and whether the answer ends with it."""
        tokens = tokens[: self.max_new_tokens - already]
        for place, token in enumerate(tokens):
            # one that is asked hears of end tokens too
            if (self.asked is not None and self.asked(token)) or token in self.eos_token_ids:
                return tokens[: place + 1], True
        return tokens, already + len(tokens) >= self.max_new_tokens


@dataclass
class Answer:
    """What the host knows of one row."""

    row: int
    """Its place among the prompts."""
    stop: Stop
    committed: int
    """Tokens in the target's cache."""
    prompt: Prompt | None
    """Until the draft has read it."""
    read: int = 0
    """Places in the draft's memory."""
    waiting: int = 0
    """Pairs that the draft has not read."""
    new: int = 0
    """Tokens of the answer so far."""
    ended: bool = False
    looks: bool = False
    """Whether the target looks at its images so much that a draft is skipped, see `vispec.model.gaze`."""

    def take(self, tokens: list[int], accepted: int, levels: int) -> Round:
        """A round's tokens: those accepted of a tree of so many levels, and the next root."""
        tokens, self.ended = self.stop.cut(tokens, self.new)
        self.new += len(tokens)
        self.committed += accepted + 1
        self.waiting = accepted + 1 if levels else self.waiting + 1
        return Round(tokens, accepted, levels, self.ended)


@dataclass
class Rows:
    """What is on the device."""

    cache: TreeCache
    offset: torch.Tensor
    """(B, 1) what M-RoPE adds to positions after the prompt."""
    root: torch.Tensor
    """(B,) the newest token, whose key is not in the cache yet."""
    kept: Kept
    """P is the most that a row can wait with."""
    memory: Memory | None
    """The draft's."""
    notes: torch.Tensor
    """(B, NOTES) what the rule of an adaptive tree remembers."""
    shown: torch.Tensor | None = None
    """(B, capacity) bool, which slots are of images; where somebody asks."""

    @property
    def stores(self) -> list[TreeCache | Memory]:
        """What remembers texts; a cache without layers of its own counts as empty, so none is told by its truth."""
        return [self.cache] if self.memory is None else [self.cache, self.memory]

    def part(self, start: int, stop: int) -> "Rows":
        """The rows [start, stop), in the same tensors."""
        rows, kept = slice(start, stop), self.kept
        return Rows(
            self.cache.part(start, stop),
            self.offset[rows],
            self.root[rows],
            Kept(kept.features[rows], kept.tokens[rows], kept.counts[rows]),
            None if self.memory is None else self.memory.part(start, stop),
            self.notes[rows],
            None if self.shown is None else self.shown[rows],
        )

    def move(self, source: int, target: int) -> None:
        """Let a row take the place of another one."""
        for store in self.stores:
            store.move(source, target)
        kept = self.kept
        for tensor in (self.offset, self.root, kept.features, kept.tokens, kept.counts, self.notes, self.shown):
            if tensor is not None:
                tensor[target] = tensor[source]

    def positions(self, depths: torch.Tensor) -> torch.Tensor:
        """(B, n) target positions of tokens at these depths under the root."""
        return self.cache.lengths[:, None] + depths + self.offset


class Verified(NamedTuple):
    """The target's pass over a tree of N nodes."""

    features: torch.Tensor
    """(B, N, F) what the draft reads."""
    logits: torch.Tensor
    """(B, N, V)."""


@torch.inference_mode()
def drop_ended(rows: Rows, answers: list[Answer]) -> None:
    """Ended answers leave `answers` and their places: the last row takes the place of each."""
    for place in reversed(range(len(answers))):
        if answers[place].ended:
            last = len(answers) - 1
            if place != last:
                rows.move(last, place)
            answers[place] = answers[last]
            answers.pop()

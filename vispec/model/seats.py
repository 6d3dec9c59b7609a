"""Room for generations, which begin and end; what is allocated and captured stays."""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from vispec.model.adaptive import NOTES
from vispec.model.drafts.base import Kept, Memory
from vispec.model.graphs import Steps
from vispec.model.policies import Policy
from vispec.model.rows import Answer, Rows, drop_ended
from vispec.model.sampling import Choice
from vispec.model.target import Target


class Seat:
    """Room for one generation after the other, and the steps that were captured over it."""

    def __init__(self, target: Target, rows: int, capacity: int, waiting: int, width: int, looks: bool):
        self.size, self.capacity, self.waiting = rows, capacity, waiting
        place = {"device": target.device}
        long = partial(torch.zeros, dtype=torch.long, **place)
        features = torch.zeros(rows, waiting, width, dtype=target.dtype, **place)
        kept = Kept(features, long(rows, waiting), long(rows))
        cache, notes = target.new_cache(rows, capacity), torch.zeros(rows, NOTES, **place)
        shown = torch.zeros(rows, cache.capacity, dtype=torch.bool, **place) if looks else None
        self.rows = Rows(cache, long(rows, 1), long(rows), kept, None, notes, shown)
        self.steps = Steps(target.device, target.can_capture)
        self.usual = 1
        """The most pairs that wait for the draft after a round."""
        self.most = 1
        """After plain steps; a seat may have room for more than the policy at hand lets wait."""
        self.levels = 0
        """Of the tree that was drafted last."""
        self.rehearsed: int | None = None
        """Levels of a tree with a rule, while steps are captured."""
        self._part: Rows | None = None
        self._addresses: tuple | None = None

    def part(self, rows: int) -> Rows:
        """The first so many rows."""
        if self._part is None or len(self._part.root) != rows:
            self._part = self.rows.part(0, rows)
        return self._part

    def follow(self, addresses: tuple) -> None:
        """Void what was captured over weights at other addresses."""
        if self._addresses not in (None, addresses):
            self.steps = self.steps.fresh()
        self._addresses = addresses

    def give_memory(self, memory: Memory) -> None:
        self.rows.memory, self._part = memory, None

    def fits(self, rows: int, capacity: int, waiting: int) -> bool:
        return self.size >= rows and self.capacity >= capacity and self.waiting >= waiting

    @torch.inference_mode()
    def enlarge(self, capacity: int) -> None:
        """Give all rows more slots; what was captured is void."""
        self.capacity, self._part = capacity, None
        self.rows.cache = self.rows.cache.enlarged(capacity)
        if self.rows.memory is not None:
            self.rows.memory = self.rows.memory.enlarged(capacity)
        if self.rows.shown is not None:
            self.rows.shown = F.pad(self.rows.shown, (0, self.rows.cache.capacity - self.rows.shown.shape[1]))
        self.steps = self.steps.fresh()


@dataclass
class Batch:
    """Answers that are decoded together."""

    seat: Seat
    choice: Choice
    policy: Policy
    """May be replaced between two rounds by one of the same shapes."""
    answers: list[Answer] = field(default_factory=list)
    """In the order of the seat's rows."""

    def leave(self, number: int) -> None:
        """End an answer before its time."""
        for answer in self.answers:
            answer.ended |= answer.row == number
        drop_ended(self.seat.rows, self.answers)

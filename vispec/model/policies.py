"""Which tree the next round drafts, if any.

A policy is asked before every round and told afterwards what the round brought. Shapes stay within those that it names
at the beginning, for which everything is allocated once.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Protocol

from vispec.model.rows import Round
from vispec.model.shape import TreeShape
from vispec.timing import now

MOST_WAITING = 128
"""Plain steps after which the draft is told what it has missed."""


class Policy(Protocol):
    """Chooses the rounds of one generation."""

    shapes: Sequence[TreeShape]
    """All trees that it may ask for; none: plain decoding."""
    waiting: int
    """Pairs for which there is room between two rounds with a draft."""

    def shape(self) -> TreeShape | None:
        """Of the next round's tree; None for a plain step."""

    def learn(self, shape: TreeShape | None, rounds: Iterable[Round]) -> None:
        """What a round with this shape brought to its rows."""


class Always:
    """The same tree in every round; None: plain decoding.

    Args:
        skipping: whether somebody else may put plain steps between the rounds.
    """

    def __init__(self, shape: TreeShape | None, skipping: bool = False):
        self.shapes = () if shape is None else (shape,)
        usual = 1 if shape is None else shape.levels + 1
        self.waiting = max(usual, MOST_WAITING) if skipping else usual
        self._shape = shape

    def shape(self) -> TreeShape | None:
        return self._shape

    def learn(self, shape: TreeShape | None, rounds: Iterable[Round]) -> None:
        """Nothing: the next round is like this one."""


SHAPES = (TreeShape(12, 3, 4), TreeShape(16, 7, 2), TreeShape(6, 2, 2), TreeShape(30, 3, 8))
"""Among which `Auto` chooses, in the order in which they are tried."""
TRIAL = 3
"""Rounds, or plain steps, between two decisions, so of a trial too."""
USELESS = 0.1
"""A draft with fewer accepted tokens a round is not tried with other trees."""
AGAIN, LATER, LONGEST_AGAIN = 96, 4, 4096
"""Rounds until what is not in use is tried again; so many times as many after every such trial, up to a limit."""
WORTH_TRYING = 0.8
"""Share of the best speed that a tree must have had to be tried again."""
BETTER = 1.05
"""Speeds must differ by this factor for a change."""
COSTS, LENGTHS = 7, 64
"""Of so many last rounds the median time and the mean acceptance count."""


class Auto:
    """Chooses by what rounds and plain steps have taken on this device, and by what was accepted lately.

    Every shape is tried for a few rounds, then the one with the most tokens a second is used, a plain step being one
    of them; the others are tried again more and more rarely. A draft that is of no use is tried with one shape, so it
    costs little more than plain decoding. What was learned stays for the next answer, and for those of other threads.

    Args:
        fit: the largest tree not above a shape that the draft can fill.
    """

    def __init__(self, fit: Callable[[TreeShape], TreeShape]):
        self.shapes = tuple(dict.fromkeys(map(fit, SHAPES)))
        self.trials: deque[TreeShape | None] = deque([None, *self.shapes])
        """What is to be tried next."""
        self.best: TreeShape | None = None
        self._seconds = {shape: deque(maxlen=COSTS) for shape in (None, *self.shapes)}
        self._accepted = {shape: deque(maxlen=LENGTHS) for shape in self.shapes}
        self._until_again = self._again = AGAIN
        self._lock = threading.Lock()

    def answer(self) -> "AutoAnswer":
        """The policy of one more generation."""
        return AutoAnswer(self)

    def learn(self, shape: TreeShape | None, seconds: float, accepted: Sequence[int]) -> None:
        """What a round took, and the accepted draft tokens of its rows."""
        with self._lock:
            self._seconds[shape].append(seconds)
            if shape is not None:
                self._accepted[shape].extend(accepted)
            self._until_again -= 1

    def speed(self, shape: TreeShape | None) -> float:
        """Tokens a second and row; 0 where nothing is known."""
        if not self._seconds[shape]:
            return 0.0
        # a round takes longer than a plain step, whatever a disturbed measurement says
        seconds = max(median(self._seconds[one]) for one in (None, shape) if self._seconds[one])
        return (1 + self.tau(shape)) / seconds

    def tau(self, shape: TreeShape | None) -> float:
        return fmean(self._accepted[shape]) if shape is not None and self._accepted[shape] else 0.0

    def decide(self) -> TreeShape | None:
        """After a trial, or some rounds with the best shape: the shape of the next ones."""
        with self._lock:
            self._choose()
            if not self.trials:
                return self.best
            self._seconds[self.trials[0]].clear()  # what it took when the machine was busier says nothing now
            return self.trials.popleft()

    def _choose(self) -> None:
        fastest = max(self._seconds, key=self.speed)
        changed = self.speed(fastest) > BETTER * self.speed(self.best)
        if changed:
            self.best, self._again = fastest, AGAIN
            self._until_again = min(self._until_again, AGAIN)
        known = [shape for shape in self.shapes if self._seconds[shape]]
        if known and max(map(self.tau, known)) < USELESS:
            self.trials = deque(shape for shape in self.trials if shape is None)
        if not self.trials and self._until_again <= 0:
            least = WORTH_TRYING * self.speed(self.best)
            worth = [shape for shape in (None, *known) if shape != self.best and self.speed(shape) > least]
            if self.best is not None:
                # while the draft was of no use, these were left out
                worth += [shape for shape in self.shapes if shape not in known]
            else:  # where no draft pays, one of them is enough to notice that this has changed
                worth = sorted(worth, key=self.speed)[-1:] or known[:1]
            self.trials = deque(worth)
            self._until_again = self._again = min(LATER * self._again, LONGEST_AGAIN)


class AutoAnswer:
    """`Auto` for one generation."""

    def __init__(self, auto: Auto):
        self._auto = auto
        self.shapes, self.waiting = auto.shapes, MOST_WAITING
        self._left, self._shape = 0, auto.best
        self._start = 0.0

    def shape(self) -> TreeShape | None:
        if self._left == 0:
            self._shape = self._auto.decide()
            self._left = TRIAL
        self._start = now()
        return self._shape

    def learn(self, shape: TreeShape | None, rounds: Iterable[Round]) -> None:
        self._left -= 1
        self._auto.learn(shape, now() - self._start, [one.accepted for one in rounds])

"""Trees that are grown as far as they seem worth it: the rules by which the field decides how deep, wide and large.

All share EAGLE-2's candidates: a node is worth the probability of its path, as the draft sees it. A rule looks at the
children of one level after the other and says which of them may be nodes, and which are expanded. What it does not use
of its largest tree stays empty, so no shape depends on it. The host asks once a level whether any row goes on; that is
one number from the device, and what a level that is left out saves is a pass of the draft.

Whoever adds a rule writes a class like those below, and its name in `RULES`. No rule may look at anything but what the
draft said and how many of its tokens were accepted in earlier rounds: then every tree is lossless, samples too.

B rows, P nodes that were expanded, k children of each; a path's probability is that of its tokens below the root. This
file does its arithmetic by the methods of tensors: command lines read it before they import torch, which takes seconds.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from vispec.model.arguments import number
from vispec.model.shape import TreeShape

if TYPE_CHECKING:
    from torch import Tensor

NOTES = 16
"""Numbers of a row that a rule may remember from round to round; zeros when an answer begins."""
SIZES = {"n": "total_token", "d": "depth", "k": "top_k"}
"""How texts call the sizes of a largest tree."""


class Children(NamedTuple):
    """All children of the nodes that were expanded in one level."""

    level: int
    """Their distance from the root."""
    parents: "Tensor"
    """(B, P) log-probability of the parents' paths; -inf where a parent only fills its place."""
    scores: "Tensor"
    """(B, P, k) the same of the children's, best first below each parent."""
    ranks: "Tensor"
    """(k,) 0, 1, …: a child's place below its parent."""
    left: "Tensor"
    """(B,) how many nodes may follow those that were expanded so far."""
    notes: "Tensor"
    """(B, NOTES) what the rule remembers of the rows; changed in place."""


class Chosen(NamedTuple):
    """What a rule says of them."""

    nodes: "Tensor | None"
    """(B, P, k) which may be nodes of the tree; None: all, the best are taken in the end."""
    expanded: "Tensor"
    """(B, P, k) which have children in turn, the top_k best of them."""


@dataclass(frozen=True)
class AdaptiveTree(TreeShape):
    """A rule with the largest tree that it may grow, which is what everything is allocated for."""

    name: ClassVar[str]
    within: ClassVar[tuple[float, float]] = (0, 1)
    """Between which its parameters lie."""

    def __post_init__(self):
        super().__post_init__()
        least, most = self.within
        for parameter in self.parameters():
            value = getattr(self, parameter)
            if value is not None and not least < number(parameter, value) < most:
                raise ValueError(f"{self.name}: {parameter} must lie between {least:g} and {most:g}, found {value:g}")

    @classmethod
    def parameters(cls) -> list[str]:
        """The rule's own, without sizes."""
        return [field.name for field in fields(cls) if field.name not in SIZES.values()]

    def choose(self, children: Children) -> Chosen:
        raise NotImplementedError

    def asks(self, level: int) -> bool:
        """Whether the host has to know after this level if any row goes on."""
        return True

    def learn(self, notes: "Tensor", accepted: "Tensor") -> None:
        """Note (B, NOTES) how many draft tokens (B,) a round has brought."""

    def __str__(self) -> str:
        values = {name: str(value) for name in self.parameters() if (value := getattr(self, name)) is not None}
        values |= {name: str(getattr(self, size)) for name, size in SIZES.items()}
        return f"{self.name}:" + ",".join(f"{name}={value}" for name, value in values.items())


@dataclass(frozen=True)
class Threshold(AdaptiveTree):
    """Expand every node whose path probability is above c.

    Ours, from the idea of Spec-LLaVA (arXiv 2509.11961), whose published texts give no threshold: it is 1 / N if none
    is given. The best N - 1 of all children are the nodes. A row ends when N nodes lie above c, when none of a level
    does, or at the largest depth.
    """

    name = "threshold"
    c: float | None = None

    def choose(self, children: Children) -> Chosen:
        above = children.scores > math.log(self.c or 1 / self.total_token)
        return Chosen(None, above & ~_full(above, children.left))


@dataclass(frozen=True)
class Talon(AdaptiveTree):
    """TALON (arXiv 2601.07353): keep what is not much worse than the best of its level.

    The first level are the k best tokens. Of the children of all nodes of a level those are kept whose path probability
    is at least mu times the greatest among them, the best ones where N binds, with which a row ends. mu = 0.03, k = 10
    and N = 60 as published (0.01 is better for weak drafts, 0.04 for strong ones).

    Ours: a largest depth; that the root is one of the N; that of the nodes kept in a level the k best are expanded, and
    the others are leaves.
    """

    name = "talon"
    total_token: int = 60
    depth: int = 8
    top_k: int = 10
    mu: float = 0.03

    def choose(self, children: Children) -> Chosen:
        scores = children.scores
        kept = _best(scores, children.left)
        if children.level > 1:
            kept &= scores >= scores.amax((1, 2), keepdim=True) + math.log(self.mu)
        return Chosen(kept, kept & ~_full(kept, children.left))


@dataclass(frozen=True)
class Sage(AdaptiveTree):
    """SAGE (arXiv 2602.00523): the tree is planned before it is drafted, deep where the draft was sure, else wide.

    Of the k = 10 best tokens of a round, renormalised to P, alpha = 1 - H(P) / log k. The next round's tree has depth
    D = 3 + alpha (8 - 3), the first width W = 2 + (1 - alpha) (10 - 2), and below it W / l (0.5 + P(parent)) children
    of each node of level l - 1; a node is kept if its path probability is above 0.1 l / D; at most 64 of them. The
    first round's tree has 25 nodes in levels of 4, 8, 8, 3 and 2. Below a mean of 2 accepted tokens in the last 10
    rounds the greatest depth shrinks, above 3 it grows. All of this is published.

    Ours: P is the distribution of the root's children; depth and widths are rounded, a width to 1 at least; P(parent)
    is its path's probability; the greatest depth changes by 1 a round, between 3 and 8; draft tokens alone count as
    accepted; where 64 binds, a row ends with the level that reaches it, and the most probable ones are kept; the k most
    probable of a level are expanded. Where another d is given, 8 is d + 1.
    """

    name = "sage"
    total_token: int = 65
    depth: int = 7
    top_k: int = 10

    LEAST_DEPTH: ClassVar[int] = 3
    WIDTHS: ClassVar[tuple[int, int]] = (2, 10)
    LEAST_PROBABILITY: ClassVar[float] = 0.1
    FIRST_TREE: ClassVar[tuple[int, ...]] = (4, 8, 8, 3, 2)
    FIRST_ALPHA: ClassVar[float] = 0.5
    LAST_ROUNDS: ClassVar[int] = 10
    WANTED: ClassVar[tuple[int, int]] = (2, 3)

    # places in a row's notes: rounds so far, alpha of the last one and of this one, by how much the greatest depth has
    # shrunk, and how much the last rounds brought
    ROUNDS: ClassVar[int] = 0
    LAST_ALPHA: ClassVar[int] = 1
    ALPHA: ClassVar[int] = 2
    SHRUNK: ClassVar[int] = 3
    HISTORY: ClassVar[int] = 4

    def choose(self, children: Children) -> Chosen:
        level, scores, notes = children.level, children.scores, children.notes
        if level == 1:
            notes[:, self.ALPHA] = self.alpha(scores[:, 0])
        begins = (notes[:, self.ROUNDS] == 0)[:, None, None]
        depth = self.planned_depth(notes)[:, None, None]
        wide_enough = children.ranks < self.widths(level, notes, children.parents.exp())[..., None]
        kept = wide_enough & (scores > (self.LEAST_PROBABILITY * level / depth).log()) & (level <= depth)
        at_first = self.FIRST_TREE[level - 1] if level <= len(self.FIRST_TREE) else 0
        kept = _best(scores, children.left * 0 + at_first).where(begins, kept)
        deep_enough = (depth * 0 + len(self.FIRST_TREE)).where(begins, depth)
        return Chosen(kept, kept & ~_full(kept, children.left) & (level < deep_enough))

    def alpha(self, log_probs: "Tensor") -> "Tensor":
        """(B, k) log-probabilities of the best tokens -> (B,) how sure the draft is, from 0 to 1."""
        if self.top_k == 1:
            return log_probs[:, 0] * 0 + 1
        log_probs = log_probs.log_softmax(-1)
        return 1 + (log_probs.exp() * log_probs).sum(-1) / math.log(self.top_k)

    def planned_depth(self, notes: "Tensor") -> "Tensor":
        """(B,) levels of this round's tree."""
        room = (self.levels - self.LEAST_DEPTH - notes[:, self.SHRUNK]).clamp(min=0)
        return (self.LEAST_DEPTH + self._known_alpha(notes) * room).round()

    def widths(self, level: int, notes: "Tensor", parents: "Tensor") -> "Tensor":
        """(B, P) how many children each of the parents may have, of which these (B, P) are the paths' probabilities."""
        least, most = self.WIDTHS
        width = (least + (1 - self._known_alpha(notes)) * (most - least))[:, None]
        return (width * (parents**0 if level == 1 else (0.5 + parents) / level)).round().clamp(min=1)

    def _known_alpha(self, notes: "Tensor") -> "Tensor":
        begins = notes[:, self.ROUNDS] == 0
        return notes[:, self.LAST_ALPHA].masked_fill(begins, self.FIRST_ALPHA)

    def learn(self, notes: "Tensor", accepted: "Tensor") -> None:
        notes[:, self.ROUNDS] += 1
        notes[:, self.LAST_ALPHA] = notes[:, self.ALPHA]
        history = notes[:, self.HISTORY : self.HISTORY + self.LAST_ROUNDS]
        history.copy_(history.roll(1, dims=1))
        history[:, 0] = accepted
        mean = history.sum(1) / notes[:, self.ROUNDS].clamp(max=self.LAST_ROUNDS)
        few, many = self.WANTED
        shrunk = notes[:, self.SHRUNK] + (mean < few).float() - (mean > many).float()
        notes[:, self.SHRUNK] = shrunk.clamp(0, max(self.levels - self.LEAST_DEPTH, 0))


@dataclass(frozen=True)
class Ddd(AdaptiveTree):
    """DDD (arXiv 2409.00142): EAGLE-2's tree, whose depth is decided on the way.

    After draft passes 5, 7 and 9 a row ends if the logarithm of the summed path probabilities of the k best nodes of
    the last level is below c = -0.3; no more than 11 levels. The pass that reads what was accepted is the first. All of
    this is published; N = 60 and k = 10 are ours.
    """

    name = "ddd"
    within = (-math.inf, 0)
    total_token: int = 60
    depth: int = 10
    top_k: int = 10
    c: float = -0.3

    PASSES: ClassVar[tuple[int, ...]] = (5, 7, 9)

    def asks(self, level: int) -> bool:
        return level in self.PASSES

    def choose(self, children: Children) -> Chosen:
        scores = children.scores
        everything = scores > -math.inf
        if children.level not in self.PASSES:
            return Chosen(None, everything)
        frontier = scores.flatten(1).topk(self.top_k, dim=1).values
        return Chosen(None, everything & (frontier.logsumexp(1) >= self.c)[:, None, None])


RULES: dict[str, type[AdaptiveTree]] = {rule.name: rule for rule in (Threshold, Talon, Sage, Ddd)}


def parse_tree(text: str) -> TreeShape:
    """A tree by its name: N/d/k such as "30/3/8", or a rule with what differs from its defaults, such as
    "talon:mu=0.04,n=40".

    Raises:
        ValueError: the text says something else.
    """
    name, colon, given = text.partition(":")
    if name not in RULES:
        if "/" in text:
            return TreeShape.parse(text)
        raise ValueError(
            f"a tree is total_token/depth/top_k such as 30/3/8, or one of {', '.join(RULES)}, found {text!r}"
        )
    rule = RULES[name]()
    kinds = SIZES | {parameter: parameter for parameter in rule.parameters()}
    values: dict[str, float] = {}
    for part in given.split(",") if colon else ():
        key, _, value = part.partition("=")
        if key not in kinds or kinds[key] in values:
            raise ValueError(f"a {name} tree takes {', '.join(kinds)}, each once as NAME=VALUE, found {part!r}")
        try:
            values[kinds[key]] = int(value) if key in SIZES else float(value)
        except ValueError:
            kind = "whole number" if key in SIZES else "number"
            raise ValueError(f"{name}: expected a {kind} for {key}, found {value!r}") from None
    return replace(rule, **values)


def _best(scores: "Tensor", count: "Tensor") -> "Tensor":
    """(B, P, k) bool: the so many (B,) best children of each row."""
    ranks = scores.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count[:, None]).view_as(scores)


def _full(kept: "Tensor", left: "Tensor") -> "Tensor":
    """(B, 1, 1) bool: where the kept children (B, P, k) take all nodes that are left."""
    return (kept.sum((1, 2)) >= left)[:, None, None]

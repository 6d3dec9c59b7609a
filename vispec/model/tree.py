"""Grow a draft tree and choose its nodes (EAGLE-2's dynamic tree).

B rows, k = top_k, N = total_token nodes with the root, M = k + depth * k² candidates, D = depth + 1 levels below the
root. Everything is a tensor of fixed shape, so that a round makes no decision on the host. An `AdaptiveTree` is grown
in the same way, but its rule has a say in every level, after which the host asks whether another one follows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from vispec.model.adaptive import AdaptiveTree, Children
from vispec.model.shape import TreeShape

EMPTY = -1
"""The token of a node that drafts nothing; it is never accepted."""


class Tree(NamedTuple):
    """A drafted tree; node 0 is the root, parents come before their children."""

    tokens: torch.Tensor
    """(B, N), EMPTY where a draft had no more to say."""
    parents: torch.Tensor
    """(B, N) index of each node's parent; 0 for the root itself."""
    depths: torch.Tensor
    """(B, N) distance from the root."""
    mask: torch.Tensor
    """(B, N, N) bool: each node with its ancestors."""
    paths: torch.Tensor
    """(B, N, D + 1) for each node the nodes from the root to it, padded with the node itself."""


class Candidates(NamedTuple):
    """What a tree's nodes are chosen from, level by level."""

    scores: torch.Tensor
    """(B, M)."""
    tokens: torch.Tensor
    """(B, M)."""
    parents: torch.Tensor
    """(B, M) candidate index of each one's parent, -1 for the root."""


class DraftOutput(NamedTuple):
    """How the estimates of a draft become tokens."""

    logits: Callable[[torch.Tensor], torch.Tensor]
    """(…, H) -> (…, V), or (…, V') with a draft vocabulary."""
    expect: Callable[[Iterable[int]], None]
    """Gets ready for so many estimates in one call."""
    token_ids: torch.Tensor | None = None
    """(V',) the token of each logit; None: they are all tokens, in order."""


@dataclass
class Growth:
    """What the host knows of a tree that is grown by a rule (`AdaptiveTree`)."""

    notes: torch.Tensor
    """(B, NOTES) what the rule remembers of the rows."""
    run: Callable | None = None
    """Where steps are captured: runs a part as a step of its own, (name, step, *arguments) -> what the step returns.
    A part's name and `levels` say what it does."""
    rehearsed: int | None = None
    """So many levels are drafted, whatever the rule says."""
    levels: int = 0
    """How many were drafted."""

    def goes_on(self, shape: AdaptiveTree, alive: torch.Tensor) -> bool:
        """After one more level, in which any row that goes on is `alive`: the one transfer of a level."""
        self.levels += 1
        if self.levels == shape.levels:
            return False
        if self.rehearsed is not None:
            return self.levels < self.rehearsed
        return not shape.asks(self.levels) or bool(alive)


class Expand(Protocol):
    """A draft on the nodes of one level after the other, from the first on."""

    sees: torch.Tensor
    """What the next level has to know of this one besides its own features."""

    def __call__(self, hidden: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor | None) -> torch.Tensor:
        """(estimates (B, k, H) of the nodes' own features, tokens (B, k), parents (B, k) among those of the level
        before, None at the first) -> estimates (B, k, H) of what follows."""

    def resume(self, level: int, sees: torch.Tensor | None) -> None:
        """Go on at a level, counted from 0, in a step of its own: with what the level before has left."""


class Frontier(NamedTuple):
    """The k nodes that are expanded next; those of an `AdaptiveTree` that only fill a place have a score of -inf."""

    scores: torch.Tensor
    """(B, k) log-probability of their paths."""
    tokens: torch.Tensor
    """(B, k)."""
    hidden: torch.Tensor
    """(B, k, H) estimates of their own features."""
    parents: torch.Tensor | None
    """(B, k) among the nodes that were expanded before; None at the first level."""
    candidates: torch.Tensor
    """(B, k) their places among all candidates."""


class Level(NamedTuple):
    """The children of what was expanded, and what the next level begins with."""

    scores: torch.Tensor
    """(B, P k)."""
    tokens: torch.Tensor
    """(B, P k)."""
    frontier: Frontier | None
    """None: it is the last level."""
    left: torch.Tensor | None = None
    """(B,) nodes that an `AdaptiveTree` may still expand."""
    alive: torch.Tensor | None = None
    """Whether any row of it goes on."""
    sees: torch.Tensor | None = None
    """`Expand.sees`, where levels are steps of their own."""


def expand_levels(
    estimates: torch.Tensor,
    expand: Expand | None,
    shape: TreeShape,
    output: DraftOutput,
    growth: Growth | None = None,
) -> Candidates:
    """Candidates level by level (EAGLE-2): each level expands its k best nodes.

    Args:
        estimates: (B, A, H) outputs of the draft that the first A levels are read from; one for an `AdaptiveTree`.
        expand: runs the draft on the nodes of a level; None where no level needs it.
        shape: `fitted` to the vocabulary.
        output: how estimates become tokens.
        growth: of an `AdaptiveTree`.

    A node's score is the sum of the log-probabilities on its path.
    """
    ahead = _top_k(estimates, shape.top_k, output) if growth is None else None
    run = growth.run if growth is not None and growth.run is not None else lambda name, step, *args: step(*args)
    levels = [run("level", _first_level, estimates, ahead, shape, output, growth)]
    while _goes_on(levels[-1], shape, growth):
        number = len(levels) + 1
        levels.append(run("level", _next_level, number, levels[-1], ahead, expand, shape, output, growth))
    return run("candidates", _all_candidates, levels, shape, growth)


def _goes_on(level: Level, shape: TreeShape, growth: Growth | None) -> bool:
    return level.frontier is not None if growth is None else growth.goes_on(shape, level.alive)


def _first_level(estimates: torch.Tensor, ahead, shape: TreeShape, output: DraftOutput, growth: Growth | None) -> Level:
    """The root's k best children, all of which are expanded if no rule says otherwise."""
    k, batch = shape.top_k, len(estimates)
    log_probs, tokens = _top_k(estimates, k, output) if ahead is None else ahead
    scores, tokens = log_probs[:, 0], tokens[:, 0]
    places = torch.arange(k, device=estimates.device).expand(batch, k)
    hidden = estimates[:, -1:].expand(-1, k, -1)
    if growth is None:
        return Level(scores, tokens, Frontier(scores, tokens, hidden, None, places) if shape.depth else None)
    left = torch.full_like(places[:, 0], shape.total_token - 1)
    ruled = _by_rule(shape, 1, torch.zeros_like(scores[:, :1]), scores[:, None], left, growth)
    return Level(ruled.scores, tokens, Frontier(ruled.frontier, tokens, hidden, None, places), ruled.left, ruled.alive)


def _next_level(
    number: int,
    before: Level,
    ahead: tuple[torch.Tensor, torch.Tensor] | None,
    expand: Expand | None,
    shape: TreeShape,
    output: DraftOutput,
    growth: Growth | None,
) -> Level:
    """The children of a frontier, of which the k best are the next one; `ahead`: what is known without a pass."""
    k, nodes, out = shape.top_k, before.frontier, None
    if ahead is not None and number <= ahead[0].shape[1]:
        log_probs, children = (x[:, number - 1, None].expand(-1, k, -1) for x in ahead)
    else:
        if growth is not None and growth.run is not None:
            expand.resume(number - 2, before.sees)
        out = expand(nodes.hidden, nodes.tokens, nodes.parents)
        log_probs, children = _top_k(out, k, output)
    scores, tokens = nodes.scores[:, :, None] + log_probs, children.flatten(1)
    if growth is None:
        scores = scores.flatten(1)
        ruled = Ruled(scores, scores)
    else:
        ruled = _by_rule(shape, number, nodes.scores, scores, before.left, growth)
    if number == shape.levels:
        return Level(ruled.scores, tokens, None)
    scores, best = ruled.frontier.topk(k, dim=1)
    parents = best // k
    hidden = nodes.hidden if out is None else out.gather(1, parents[..., None].expand(-1, -1, out.shape[2]))
    places = k + (number - 2) * k * k + best
    frontier = Frontier(scores, tokens.gather(1, best), hidden, parents, places)
    return Level(ruled.scores, tokens, frontier, *ruled[2:], expand.sees if growth and growth.run else None)


class Ruled(NamedTuple):
    """The scores (B, P k) of a level: of its nodes, and of those among them that may be expanded; -inf for others."""

    scores: torch.Tensor
    frontier: torch.Tensor
    left: torch.Tensor | None = None
    alive: torch.Tensor | None = None


def _by_rule(
    shape: AdaptiveTree, number: int, parents: torch.Tensor, scores: torch.Tensor, left: torch.Tensor, growth: Growth
) -> Ruled:
    """What a rule makes of the children (B, P, k) of `parents` (B, P)."""
    ranks = torch.arange(shape.top_k, device=scores.device)
    chosen = shape.choose(Children(number, parents, scores, ranks, left, growth.notes))
    frontier = scores.masked_fill(~chosen.expanded, -torch.inf).flatten(1)
    if chosen.nodes is not None:
        scores = scores.masked_fill(~chosen.nodes, -torch.inf)
    return Ruled(scores.flatten(1), frontier, left - chosen.expanded.sum((1, 2)), (frontier > -torch.inf).any())


def _all_candidates(levels: list[Level], shape: TreeShape, growth: Growth | None) -> Candidates:
    """As many as the shape has, whatever levels there are."""
    k = shape.top_k
    scores, tokens = (torch.cat([level[i] for level in levels], 1) for i in (0, 1))
    parents = torch.full_like(levels[0].tokens, -1)
    expanded = [level.frontier.candidates for level in levels[:-1]]
    if expanded:
        parents = torch.cat([parents, torch.cat(expanded, 1).repeat_interleave(k, dim=1)], dim=1)
    if growth is None:
        return Candidates(scores, tokens, parents)
    missing = 0, shape.candidates - scores.shape[1]
    tokens = tokens.masked_fill(scores == -torch.inf, EMPTY)
    fillings = ((scores, -torch.inf), (tokens, EMPTY), (parents, -1))
    return Candidates(*(F.pad(values, missing, value=filling) for values, filling in fillings))


def choose_nodes(root: torch.Tensor, candidates: Candidates, shape: TreeShape) -> Tree:
    """The tree of a round: the N - 1 best candidates, in the order of their creation, below `root` (B,)."""
    scores, tokens, parents = candidates
    # a stable sort, since a child that ties with its parent must not be chosen before it
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.total_token - 1].sort(dim=1).values
    nodes = torch.arange(1, chosen.shape[1] + 1, device=root.device).expand_as(chosen)
    node_of = tokens.new_zeros(len(root), tokens.shape[1] + 1)  # column 0: the root's "-1"
    node_of.scatter_(1, chosen + 1, nodes)
    node_parents = node_of.gather(1, parents.gather(1, chosen) + 1)
    tokens = torch.cat([root[:, None], tokens.gather(1, chosen)], dim=1)
    parents = torch.cat([torch.zeros_like(root)[:, None], node_parents], dim=1)
    return tree_of(tokens, parents, shape.levels)


def tree_of(tokens: torch.Tensor, parents: torch.Tensor, levels: int) -> Tree:
    """The tree of a table of parents (B, N), which has at most so many levels below the root."""
    batch, n = parents.shape
    itself = torch.arange(n, device=parents.device).expand(batch, n)
    upwards = [itself]  # after j steps up; the root's parent is the root
    for _ in range(levels):
        upwards.append(parents.gather(1, upwards[-1]))
    upwards = torch.stack(upwards, dim=2)
    mask = torch.zeros(batch, n, n, dtype=torch.bool, device=parents.device).scatter_(2, upwards, True)
    depths = mask.sum(2) - 1
    step = torch.arange(levels + 1, device=parents.device)
    return Tree(tokens, parents, depths, mask, upwards.gather(2, (depths[..., None] - step).clamp_(min=0)))


def _top_k(estimates: torch.Tensor, k: int, output: DraftOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best log-probabilities and their tokens, in float32: in half precision too many of them tie."""
    log_probs, best = output.logits(estimates).float().log_softmax(-1).topk(k, dim=-1)
    return log_probs, best if output.token_ids is None else output.token_ids[best]

"""Grow a draft tree and choose its nodes (EAGLE-2's dynamic tree).

B rows, k = top_k, N = total_token nodes with the root, M = k + depth * k² candidates, D = depth + 1 levels below the
root. Everything is a tensor of fixed shape, so that a round makes no decision on the host.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch

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

    def retrieve_indices(self, row: int = 0) -> torch.Tensor:
        """(leaves, longest path) root-to-leaf paths of one row, padded with -1, ordered by leaf."""
        parents = self.parents[row]
        is_leaf = torch.ones_like(parents, dtype=torch.bool).index_fill_(0, parents, False)
        depths = self.depths[row][is_leaf]
        longest = int(depths.max()) + 1
        beyond = torch.arange(longest, device=depths.device) > depths[:, None]
        return self.paths[row][is_leaf, :longest].masked_fill(beyond, -1)


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


class Proposes(Protocol):
    """A draft, as far as a tree asks it."""

    def candidates(self, memory, root: torch.Tensor, shape: TreeShape, output: DraftOutput) -> Candidates:
        """All that it proposes below `root` (B,), after what its memory holds."""


def grow(draft: Proposes, memory, root: torch.Tensor, shape: TreeShape, output: DraftOutput) -> Tree:
    """The tree of a round: the N - 1 best of all that a draft proposes.

    Args:
        memory: what the draft has read.
        root: (B,) token at the root.
        shape: must be one that the draft can fill, see `Draft.fit`.
        output: how the draft's estimates become tokens.
    """
    return choose_nodes(root, *draft.candidates(memory, root, shape, output), shape)


Expand = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Called for one level after the other, from the first on: (estimates (B, k, H) of the nodes' own features, tokens
(B, k), parents (B, k) among those of the level before, None at the first) -> estimates (B, k, H) of what follows."""


def expand_levels(
    estimates: torch.Tensor, expand: Expand | None, root: torch.Tensor, shape: TreeShape, output: DraftOutput
) -> Candidates:
    """Candidates level by level (EAGLE-2): each level expands its k best nodes.

    Args:
        estimates: (B, A, H) outputs of the draft that the first A levels are read from.
        expand: runs the draft on the nodes of a level; None where no level needs it.
        root: (B,) token at the root.
        shape: `fitted` to the vocabulary.

    A node's score is the sum of the log-probabilities on its path.
    """
    k = shape.top_k
    batch, device = root.shape[0], root.device
    known_log_probs, known_tokens = _top_k(estimates, k, output)
    known = known_tokens.shape[1]
    scores, tokens = known_log_probs[:, 0], known_tokens[:, 0]
    all_scores, all_tokens, frontiers = [scores], [tokens], []

    frontier = torch.arange(k, device=device).expand(batch, k)
    hidden = estimates[:, -1:].expand(-1, k, -1)
    parent = None
    for level in range(1, shape.depth + 1):
        if level < known:
            log_probs, children = (x[:, level, None].expand(-1, k, -1) for x in (known_log_probs, known_tokens))
        else:
            out = expand(hidden, tokens, parent)
            log_probs, children = _top_k(out, k, output)
        child_scores = (scores[:, :, None] + log_probs).flatten(1)
        all_scores.append(child_scores)
        all_tokens.append(children.flatten(1))
        frontiers.append(frontier)
        if level == shape.depth:
            break
        scores, best = child_scores.topk(k, dim=1)
        parent = best // k
        frontier = k + (level - 1) * k * k + best
        tokens = all_tokens[-1].gather(1, best)
        if level >= known:
            hidden = out.gather(1, parent[..., None].expand(-1, -1, out.shape[2]))
    parents = torch.full_like(all_tokens[0], -1)
    if frontiers:
        parents = torch.cat([parents, torch.cat(frontiers, 1).repeat_interleave(k, dim=1)], dim=1)
    return Candidates(torch.cat(all_scores, 1), torch.cat(all_tokens, 1), parents)


def choose_nodes(
    root: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor, shape: TreeShape
) -> Tree:
    """Take the N - 1 best candidates, in the order of their creation.

    Args:
        root: (B,) token of node 0.
        scores, tokens, parents: (B, M), see `Candidates`.
    """
    batch, candidates = scores.shape
    # a stable sort, since a child that ties with its parent must not be chosen before it
    chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, : shape.total_token - 1].sort(dim=1).values
    nodes = torch.arange(1, chosen.shape[1] + 1, device=root.device).expand_as(chosen)
    node_of = torch.zeros(batch, candidates + 1, dtype=torch.long, device=root.device)  # column 0: the root's "-1"
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

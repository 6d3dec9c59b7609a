"""Grow a draft tree and choose its nodes (EAGLE-2's dynamic tree).

B rows, k = top_k, N = total_token nodes with the root, M = k + depth * k² candidates, D = depth + 1 levels below the
root. Everything is a tensor of fixed shape, so that a round makes no decision on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from vispec.model.rows import Rows

if TYPE_CHECKING:  # the heads import this module
    from vispec.model.draft import DraftHead, DraftState
    from vispec.model.medusa import MedusaHead, MedusaState

EMPTY = -1
"""The token of a node that drafts nothing; it is never accepted."""


@dataclass(frozen=True)
class TreeShape:
    """How large a tree is: N nodes with the root, `depth` expansions, `top_k` nodes a level."""

    total_token: int = 30
    depth: int = 3
    top_k: int = 8

    def __post_init__(self):
        for name, least in (("total_token", 2), ("depth", 0), ("top_k", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")

    @property
    def candidates(self) -> int:
        return self.top_k + self.depth * self.top_k**2

    @property
    def levels(self) -> int:
        """Levels below the root: at most so many draft tokens are accepted in a round."""
        return self.depth + 1

    def fitted(self, vocabulary: int, depth: int | None = None) -> "TreeShape":
        """The largest tree not above this one that a vocabulary of that size can fill; `depth` replaces its own."""
        depth = self.depth if depth is None else depth
        shape = TreeShape(self.total_token, depth, min(self.top_k, vocabulary))
        return TreeShape(min(self.total_token, shape.candidates + 1), shape.depth, shape.top_k)


@dataclass
class Tree(Rows):
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


def grow_tree(
    draft: "DraftHead | MedusaHead",
    state: "DraftState | MedusaState",
    root: torch.Tensor,
    shape: TreeShape,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor | None = None,
) -> Tree:
    """Draft a tree under the last committed pair; arguments as for `grow_candidates`."""
    return choose_nodes(root, *grow_candidates(draft, state, root, shape, lm_head, token_ids), shape)


def grow_candidates(
    draft: "DraftHead | MedusaHead",
    state: "DraftState | MedusaState",
    root: torch.Tensor,
    shape: TreeShape,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor | None = None,
) -> Candidates:
    """All that a draft proposes under the last committed pair.

    Args:
        draft, state: the head and its memory; `state.estimates` (B, A, H) are the outputs that the first A levels are
            read from. Below that the head is run on the nodes of a level.
        root: (B,) token at the root.
        shape: must be `fitted` to the vocabulary, and to the head's `fixed_depth`.
        lm_head: (…, H) -> (…, V), the target's output head, or the rows of a draft vocabulary.
        token_ids: (V,) the token of each logit where there is a draft vocabulary.

    A node's score is the sum of the log-probabilities on its path. Each level expands its k best nodes; of all M
    candidates ever scored, the N - 1 best become the tree.
    """
    k = shape.top_k
    batch, device = root.shape[0], root.device
    known_log_probs, known_tokens = _top_k(lm_head(state.estimates), k, token_ids)
    known = known_tokens.shape[1]
    scores, tokens = known_log_probs[:, 0], known_tokens[:, 0]
    all_scores, all_tokens = [scores], [tokens]
    all_parents = [torch.full_like(tokens, -1)]

    frontier = torch.arange(k, device=device).expand(batch, k)
    hidden = state.estimates[:, -1:].expand(-1, k, -1)
    seen = torch.zeros(batch, k, 0, dtype=torch.bool, device=device)
    itself = torch.eye(k, dtype=torch.bool, device=device).expand(batch, k, k)
    for level in range(1, shape.depth + 1):
        if level < known:
            log_probs, children = (x[:, level, None].expand(-1, k, -1) for x in (known_log_probs, known_tokens))
        else:
            seen = torch.cat([seen, itself], dim=2)
            out = draft.expand(state, level, hidden, tokens, seen)
            log_probs, children = _top_k(lm_head(out), k, token_ids)
        child_scores = (scores[:, :, None] + log_probs).flatten(1)
        all_scores.append(child_scores)
        all_tokens.append(children.flatten(1))
        all_parents.append(frontier[:, :, None].expand(-1, -1, k).flatten(1))
        if level == shape.depth:
            break
        scores, best = child_scores.topk(k, dim=1)
        parent = best // k
        frontier = k + (level - 1) * k * k + best
        tokens = all_tokens[-1].gather(1, best)
        if level >= known:
            hidden = out.gather(1, parent[..., None].expand(-1, -1, out.shape[2]))
            seen = seen.gather(1, parent[..., None].expand(-1, -1, seen.shape[2]))
    return Candidates(torch.cat(all_scores, 1), torch.cat(all_tokens, 1), torch.cat(all_parents, 1))


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
    return Tree(tokens, parents, *_lineage(parents, shape.levels))


def _lineage(parents: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depths (B, N), ancestor mask (B, N, N) and paths (B, N, levels + 1) of a table of parents."""
    batch, n = parents.shape
    itself = torch.arange(n, device=parents.device).expand(batch, n)
    upwards = [itself]  # after j steps up; the root's parent is the root
    for _ in range(levels):
        upwards.append(parents.gather(1, upwards[-1]))
    upwards = torch.stack(upwards, dim=2)
    mask = torch.zeros(batch, n, n, dtype=torch.bool, device=parents.device).scatter_(2, upwards, True)
    depths = mask.sum(2) - 1
    step = torch.arange(levels + 1, device=parents.device)
    return depths, mask, upwards.gather(2, (depths[..., None] - step).clamp_(min=0))


def _top_k(
    logits: torch.Tensor, k: int, token_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best log-probabilities and their tokens, in float32: in half precision too many of them tie."""
    log_probs, best = logits.float().log_softmax(-1).topk(k, dim=-1)
    return log_probs, best if token_ids is None else token_ids[best]

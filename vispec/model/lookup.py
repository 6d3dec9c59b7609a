"""Prompt lookup: a draft that needs no model and no training (Saxena, 2023; here with a tree).

The end of the text so far is looked for in prompt and answer. What followed its occurrences is the draft: the longest
matches first, among equally long ones the latest first, each match a branch of the tree. Branches that begin
alike share their nodes. Where there are too few matches, nodes stay empty: their token is -1, which no target names.

B rows, W slots for text, k branches, D levels, N nodes of the tree.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vispec.model.pairs import Span
from vispec.model.rows import Rows
from vispec.model.target import Prompt
from vispec.model.tree import EMPTY, Candidates, Tree, TreeShape, choose_nodes

LONGEST_MATCH = 8
"""Tokens of a match that count; matches of more tokens are equally good."""
MOST_BRANCHES = 512
"""A text has at least as many slots, since the places of branches are chosen among them."""


@dataclass
class LookupState(Rows):
    """The texts of a generation."""

    ids: torch.Tensor
    """(B, W) prompt and answer so far, the root included; EMPTY at image tokens, anything behind the text."""
    lengths: torch.Tensor
    """(B,)"""
    used: int
    """Host-side upper bound of `lengths`."""

    def room_for(self, batch_size: int, capacity: int) -> "LookupState":
        ids = self.ids.new_full((batch_size, max(capacity, self.ids.shape[1])), EMPTY)
        return LookupState(ids, self.lengths.new_zeros(batch_size), self.used)

    def copy_(self, other: "LookupState") -> None:
        slots = min(other.used, other.ids.shape[1])  # the bound may be rounded up beyond what is there
        self.ids[:, :slots] = other.ids[:, :slots]
        self.lengths.copy_(other.lengths)


class PromptLookup:
    """Drafts what followed earlier occurrences of the last few tokens."""

    method = "lookup"

    def fit(self, shape: TreeShape) -> TreeShape:
        """The largest tree not above this one: up to MOST_BRANCHES of depth + 1 tokens."""
        k = min(shape.top_k, MOST_BRANCHES)
        return replace(shape, total_token=min(shape.total_token, k * shape.levels + 1), top_k=k)

    def reach(self, shape: TreeShape) -> int:
        """Slots that a round needs behind what was read before it."""
        return shape.levels + 1

    def held(self, length: int, images: list[Span]) -> int:
        """How many places a prompt of one row takes in its text."""
        return length

    def start(self, prompt: Prompt, root: torch.Tensor, capacity: int) -> LookupState:
        """Read the prompt; `root` (B,) is the first new token, `capacity` the tokens that there must be room for."""
        batch, length = prompt.input_ids.shape
        ids = root.new_full((batch, max(capacity, MOST_BRANCHES)), EMPTY)
        ids[:, :length] = prompt.input_ids
        for row, spans in enumerate(prompt.images):
            for start, end in spans:
                ids[row, start:end] = EMPTY
        ids[:, length] = root
        return LookupState(ids, torch.full_like(root, length + 1), length + 1)

    def extend(self, state: LookupState, hidden: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Add the tokens of a verified path; arguments as for `DraftHead.extend`."""
        steps = tokens.shape[1]
        places = state.lengths[:, None] + torch.arange(steps, device=tokens.device)
        state.ids.scatter_(1, places, tokens)
        state.lengths += counts
        state.used += steps

    def grow(self, state: LookupState, root: torch.Tensor, shape: TreeShape, lm_head, token_ids=None) -> Tree:
        """The tree under `root`, which must be `fit`; `lm_head` and `token_ids` are what other drafts need."""
        return choose_nodes(root, *self.candidates(state, root, shape), shape)

    def candidates(
        self, state: LookupState, root: torch.Tensor, shape: TreeShape, lm_head=None, token_ids=None
    ) -> Candidates:
        """What the nodes of that tree are chosen from; it does not depend on `total_token`."""
        k, levels = shape.top_k, shape.levels
        tokens = continuations(state.ids[:, : max(state.used, k)], state.lengths, k, levels)
        first = first_alike(tokens)
        branch = torch.arange(k, device=root.device)[:, None]
        level = torch.arange(levels, device=root.device)
        fresh = (first == branch) & (tokens != EMPTY)
        # a node's parent is on the first branch that has it, so it comes earlier, and its score is higher
        parents = F.pad(first[:, :, :-1] * levels + level[:-1], (1, 0), value=-1)
        scores = -(branch + level).float().expand_as(tokens)
        return Candidates(
            scores.masked_fill(~fresh, -torch.inf).flatten(1),
            tokens.masked_fill(~fresh, EMPTY).flatten(1),
            parents.masked_fill(~fresh, -1).flatten(1),
        )


def continuations(ids: torch.Tensor, lengths: torch.Tensor, k: int, levels: int) -> torch.Tensor:
    """(B, k, D) tokens behind the k best matches of each row's end, best first; EMPTY where there is no token.

    Args:
        ids: (B, W) with W >= k.
        lengths: (B,) tokens of each row.
    """
    width = ids.shape[1]
    windows = F.pad(ids, (LONGEST_MATCH - 1, 0), value=EMPTY).unfold(1, LONGEST_MATCH, 1)  # [b, j]: up to token j
    end = windows.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, LONGEST_MATCH))
    matched = ((windows == end) & (end != EMPTY)).flip(2).cumprod(2).sum(2)
    place = torch.arange(width, device=ids.device)
    matched = matched.masked_fill(place >= (lengths - 1)[:, None], 0)  # the end itself is no match
    best = (matched * width + place).topk(k, dim=1).indices
    places = best[..., None] + 1 + torch.arange(levels, device=ids.device)
    tokens = ids[:, None].expand(-1, k, -1).gather(2, places.clamp(max=width - 1))
    there = (matched.gather(1, best) > 0)[..., None] & (places < lengths[:, None, None]) & (tokens != EMPTY)
    return tokens.masked_fill(there.cumprod(2) == 0, EMPTY)


def first_alike(tokens: torch.Tensor) -> torch.Tensor:
    """(B, k, D): for each branch and level the first branch with the same tokens up to there."""
    k = tokens.shape[1]
    alike = (tokens[:, :, None] == tokens[:, None]).cumprod(3) > 0  # (B, k, k, D)
    others = torch.arange(k, device=tokens.device)[:, None]
    return others.expand_as(alike).masked_fill(~alike, k).amin(2)

"""Prompt lookup: a draft that needs no model and no training (Saxena, 2023; here with a tree).

The end of the text so far is looked for in prompt and answer. What followed its occurrences is the draft: the longest
matches first, among equally long ones the latest first, each match a branch of the tree. Branches that begin
alike share their nodes. Where there are too few matches, nodes stay empty: their token is -1, which no target names.

B rows, W slots for text, k branches, D levels, N nodes of the tree.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vispec.model.drafts.base import Draft, Kept
from vispec.model.prompt import Prompt
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.tree import EMPTY, Candidates, DraftOutput, Growth

LONGEST_MATCH = 8
"""Tokens of a match that count; matches of more tokens are equally good."""
MOST_BRANCHES = 512
"""A text has at least as many slots, since the places of branches are chosen among them."""


@dataclass
class LookupMemory:
    """The texts of a generation."""

    ids: torch.Tensor
    """(B, W) prompt and answer so far, the root included; EMPTY at image tokens, anything behind the text."""
    lengths: torch.Tensor
    """(B,)"""
    used: int = 0

    def part(self, start: int, stop: int) -> "LookupMemory":
        return LookupMemory(self.ids[start:stop], self.lengths[start:stop], self.used)

    def move(self, source: int, target: int) -> None:
        self.ids[target] = self.ids[source]
        self.lengths[target] = self.lengths[source]

    def clear(self) -> None:
        self.ids.fill_(EMPTY)
        self.lengths.zero_()
        self.used = 0

    def enlarged(self, capacity: int) -> "LookupMemory":
        return replace(self, ids=F.pad(self.ids, (0, max(capacity - self.ids.shape[1], 0)), value=EMPTY))


class PromptLookup(Draft):
    """Drafts what followed earlier occurrences of the last few tokens."""

    method = "lookup"
    by_level = False

    def check(self, target: Target) -> None:
        """Nothing: it fits all."""

    def make_lean(self) -> None:
        """Nothing: there are no weights."""

    def fit(self, shape: TreeShape) -> TreeShape:
        """The largest tree not above this one: up to MOST_BRANCHES of depth + 1 tokens."""
        k = min(shape.top_k, MOST_BRANCHES)
        return replace(shape, total_token=min(shape.total_token, k * shape.levels + 1), top_k=k)

    def reach(self, shape: TreeShape) -> int:
        return shape.levels + 1

    def output(self, target: Target) -> DraftOutput:
        return DraftOutput(target.logits, lambda rows: None)

    def memory(self, rows: int, capacity: int, target: Target) -> LookupMemory:
        shape = rows, max(capacity, MOST_BRANCHES)
        ids = torch.full(shape, EMPTY, dtype=torch.long, device=target.device)
        return LookupMemory(ids, torch.zeros(rows, dtype=torch.long, device=target.device))

    def expect(self, batch: int, shape: TreeShape) -> None:
        """Nothing: there are no products."""

    def read(self, memory: LookupMemory, prompt: Prompt) -> int:
        memory.clear()
        length = prompt.input_ids.shape[1]
        memory.ids[:, :length] = prompt.input_ids
        for start, end in prompt.images[0]:
            memory.ids[:, start:end] = EMPTY
        memory.lengths.fill_(length)
        return length

    def extend(self, memory: LookupMemory, kept: Kept) -> None:
        steps = kept.tokens.shape[1]
        places = memory.lengths[:, None] + torch.arange(steps, device=kept.tokens.device)
        memory.ids.scatter_(1, places, kept.tokens)
        memory.lengths += kept.counts
        memory.used += steps

    def candidates(
        self, memory: LookupMemory, shape: TreeShape, output: DraftOutput | None = None, growth: Growth | None = None
    ) -> Candidates:
        """Branches below the root; they do not depend on `total_token`."""
        k, levels = shape.top_k, shape.levels
        tokens = self.branches(memory, k, levels)
        first = first_alike(tokens)
        branch = torch.arange(k, device=tokens.device)[:, None]
        level = torch.arange(levels, device=tokens.device)
        fresh = (first == branch) & (tokens != EMPTY)
        # a node's parent is on the first branch that has it, so it comes earlier, and its score is higher
        parents = F.pad(first[:, :, :-1] * levels + level[:-1], (1, 0), value=-1)
        scores = -(branch + level).float().expand_as(tokens)
        return Candidates(
            scores.masked_fill(~fresh, -torch.inf).flatten(1),
            tokens.masked_fill(~fresh, EMPTY).flatten(1),
            parents.masked_fill(~fresh, -1).flatten(1),
        )

    def branches(self, memory: LookupMemory, k: int, levels: int) -> torch.Tensor:
        """(B, k, D) tokens of the branches, best first; EMPTY where there is no token."""
        return continuations(memory.ids[:, : max(memory.used, k)], memory.lengths, k, levels)


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

"""Medusa's draft head (Cai et al., arXiv 2401.10774): several small heads on one feature, no attention, no memory.

Head j reads the target's feature h of the last committed token and estimates a later feature as h + silu(linear_j(h)).
The target's output head turns that into the token j + 2 places ahead: head 0's is the one after the root. No head knows
what the others say, so the candidates of a level are the same below every node of the level before. Trees have as
many levels as there are heads, whatever depth is asked for.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vispec.model.drafts.base import BaseHead, Kept
from vispec.model.drafts.config import DraftConfig
from vispec.model.prompt import Prompt
from vispec.model.shape import TreeShape
from vispec.model.target import Target
from vispec.model.tree import Candidates, DraftOutput, Growth, expand_levels

HEADS = 5


@dataclass
class MedusaMemory:
    """What the head remembers of a text: its end."""

    estimates: torch.Tensor
    """(B, heads, H) outputs at the last pair's feature: estimates of the feature of the root and of those after it."""
    used: int = 0

    def part(self, start: int, stop: int) -> "MedusaMemory":
        return MedusaMemory(self.estimates[start:stop])

    def move(self, source: int, target: int) -> None:
        self.estimates[target] = self.estimates[source]

    def clear(self) -> None:
        self.estimates.zero_()

    def enlarged(self, capacity: int) -> "MedusaMemory":
        return self


class MedusaBlock(nn.Module):
    """x + silu(linear(x)); the linear layer starts at zero, so an untrained head says what the target said last."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


class MedusaHead(BaseHead):
    """The heads of Medusa, used like one draft head of another method."""

    method = "medusa"
    by_level = False

    def __init__(self, config: DraftConfig, heads: int = HEADS):
        super().__init__(config)
        # one block a head; the list around it is in the names of the published checkpoints
        self.medusa_head = nn.ModuleList([nn.Sequential(MedusaBlock(config.hidden_size)) for _ in range(heads)])

    @property
    def fixed_depth(self) -> int:
        """One level a head, the first of which is no expansion."""
        return len(self.medusa_head) - 1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) features -> (…, heads, H) estimates of the features of the tokens after each, the next one first."""
        return torch.stack([head(hidden) for head in self.medusa_head], dim=-2)

    def memory(self, rows: int, capacity: int, target: Target) -> MedusaMemory:
        shape = rows, len(self.medusa_head), self.config.hidden_size
        return MedusaMemory(torch.zeros(shape, dtype=target.dtype, device=target.device))

    def beside_layers(self) -> list[nn.Module]:
        return [block.linear for (block,) in self.medusa_head]

    def expect(self, batch: int, shape: TreeShape) -> None:
        if self._products is not None:
            self._products.expect([batch])

    def read(self, memory: MedusaMemory, prompt: Prompt) -> int:
        self.refresh()
        return 0

    def extend(self, memory: MedusaMemory, kept: Kept) -> None:
        index = (kept.counts - 1)[:, None, None].expand(-1, 1, kept.features.shape[2])
        last = kept.features.gather(1, index)[:, 0]
        memory.estimates.copy_(
            torch.stack([last + F.silu(self.linear(block.linear, last)) for (block,) in self.medusa_head], dim=-2)
        )

    def candidates(
        self, memory: MedusaMemory, shape: TreeShape, output: DraftOutput, growth: Growth | None = None
    ) -> Candidates:
        return expand_levels(memory.estimates, None, shape, output)

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

from vispec.model.draft import BaseHead
from vispec.model.draft_config import DraftConfig
from vispec.model.pairs import Span
from vispec.model.passes import decoding_pass
from vispec.model.rows import Rows

HEADS = 5


@dataclass
class MedusaState(Rows):
    """What the head remembers between the rounds of one generation."""

    estimates: torch.Tensor
    """(B, heads, H) outputs at the last committed token: estimates of the feature of the root and of those after it."""
    used: int = 0
    """What other heads have read of a text; Medusa remembers its end alone."""


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

    @decoding_pass()
    def begin(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        root: torch.Tensor,
        images: list[list[Span]],
        capacity: int | None = None,
    ) -> MedusaState:
        """Read the prompt: `hidden` (B, L, H) of the target's pass over it; the rest is what other heads read."""
        return MedusaState(self(hidden[:, -1]))

    @decoding_pass()
    def extend(self, state: MedusaState, hidden: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Go on from the last committed token of a verified path; arguments as for `DraftHead.extend`."""
        last = hidden.gather(1, (counts - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        state.estimates.copy_(self(last))

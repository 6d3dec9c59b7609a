"""The EAGLE-2 draft head (Li et al., arXiv 2406.16858), and the base of ViSpec's and of MSD's.

    x_i = fc([embedding of token i+1; feature of token i])

goes through one Llama-style decoder layer without an input norm; the output estimates the feature of token i+1, and the
target's own output head turns it into the logits of token i+2. Image rows are ordinary pairs.
"""

import torch
from torch import nn

from vispec.model.drafts.config import DraftConfig
from vispec.model.drafts.layer import DraftLayer
from vispec.model.drafts.pair_head import PairHead


class DraftHead(PairHead):
    """The EAGLE-2 head. Parameter names are those of the published checkpoints."""

    method = "eagle2"
    compressed_per_image: int | None = None
    """Vectors that stand for one image in the draft sequence; None keeps every image row."""

    def __init__(self, config: DraftConfig, input_norm: bool = False):
        if config.rope_scaling is not None:
            raise ValueError(f"rope_scaling {config.rope_scaling} is not supported, a {self.method} head wants null")
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([DraftLayer(config, input_norm) for _ in range(config.num_hidden_layers)])

    def fuse(
        self, next_embeds: torch.Tensor, hidden: torch.Tensor, global_feature: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Layer input of text pairs, (B, R, H): fc([embedding of token i+1; feature of token i])."""
        return self.linear(self.fc, torch.cat([next_embeds, hidden], dim=-1))

"""A convolution for the vision towers that another library makes, timm."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput


class Tower(nn.Module):
    """Squares of 14 pixels."""

    def __init__(self, config):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 14, 14)
        self.in_a_row = "embed_dim" in (config.model_args or {})

    def forward(self, pixel_values: torch.Tensor, **_) -> BaseModelOutput:
        """(N, 3, H, W) -> (N, 32, H / 14, W / 14), or PerceptionLM's (N, patches, 32)."""
        patches = self.patches(pixel_values)
        return BaseModelOutput(patches.flatten(2).mT if self.in_a_row else patches)


@contextmanager
def without_timm() -> Iterator[None]:
    """Models that are built get our tower where they want one of timm's."""
    from_config = AutoModel.from_config

    def choose(config, **options) -> nn.Module:
        return Tower(config) if hasattr(config, "architecture") else from_config(config, **options)

    with patch.object(AutoModel, "from_config", choose):
        yield
